"""The type checker behind the shape annotations in a test run: ints pass as floats, as static checkers have it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
