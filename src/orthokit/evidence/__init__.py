"""What training did: networks evaluated, arms compared, tables, figures and pages, studies."""
