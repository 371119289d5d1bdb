"""Ahead of time: a folder of programs that run without the model's Python code, and without transformers.

export.py      a model and its profile -> the folder
programs.py    what is traced: prefill, decode, and one vision program per picture size
manifest.py    `manifest.json`: what lies in the folder, for whom, and the sha256 of every file
loaded.py      the folder -> a callable that takes the model's own inputs and returns logits and a cache
targets.py     what each target writes, and how it is run; one module for each beside it
"""
