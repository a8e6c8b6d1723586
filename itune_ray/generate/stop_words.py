"""Words that carry grammar and no content of their own: an answer of nothing else says nothing."""

_WORDS = """
a an and are as at be but by can do does for from has have he her him his how i if in into is it its me my no not of on
or our she should so than that the their them then there these they this those to us was we were what when where which
who why will with would yes you your
"""
STOP_WORDS = frozenset(_WORDS.split())
"""In lower case; `no`, `not` and `yes` among them."""
