"""The decision document: two pages for the reader who decides, an appendix for the one who checks.

`sweep` and `frontier` have the records as plans, `paired` their differences, `verdict` the rule,
`answers` the words; `*_tables` say which metric stands in which column; `document` writes.
"""
