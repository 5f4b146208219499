"""The playground, ``diffgraft ui``: a page in the browser on which a stack is put together, run and held against the plain pipeline.

What it does is pure functions and a measurement of `lab.compare`; ``page.py`` alone knows Gradio.
"""
