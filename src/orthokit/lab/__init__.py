"""Networks trained by recipes, evaluated and compared.

The way of a result through the rooms: :mod:`recipes <orthokit.lab.recipes>`, which name :mod:`data <orthokit.lab.data>` and
:mod:`networks <orthokit.lab.networks>`; :mod:`runs <orthokit.lab.runs>`, which :mod:`training <orthokit.lab.training>` fills;
:mod:`evaluation <orthokit.lab.evaluation>`; :mod:`comparison <orthokit.lab.comparison>`; :mod:`reporting
<orthokit.lab.reporting>`. A :mod:`study <orthokit.lab.study>` goes all of it.
"""
