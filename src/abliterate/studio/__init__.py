"""The studio: a web page on which an edit is tried, compared, chosen and kept.

`folder` says what the page may touch, `models` and `session` hold what is loaded and each user's strengths, `runs` are
subprocesses, `frontier` shows what a run found, `page` lays it out, `server` serves it. Only `page` and `server` know
gradio.
"""
