"""The studio: a web page on which an edit is tried, compared, chosen and kept.

`folder` says what the page may touch, `models` and `session` hold what is loaded and each user's strengths, `runs` are
subprocesses, `frontier` shows what a run found, `shared` is what all users have in common. `page` is the page's frame,
`tabs` what a user sees on it, `views` the HTML of it, `server` serves it. Only `page`, `tabs` and `server` know gradio.
"""
