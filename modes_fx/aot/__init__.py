"""Ahead of time: a folder of programs that run without the model's Python code, and without transformers.

export.py      a model and its profile -> the folder
programs.py    what is traced: prefill, decode, and one vision program per picture size
manifest.py    `manifest.json`: what lies in the folder, for whom, and the sha256 of every file
loaded.py      the folder -> a callable that takes the model's own inputs and returns logits and a cache
targets.py     what each target writes, and how it is run; one module for each beside it

For TensorRT on a GPU host, beside tensorrt_target.py:

kernel_bundle.py      the Triton kernels as PTX, and the table of their launches
tensorrt_onnx.py      ONNX files with a chain of plugins for each block
tensorrt_plugins.py   those plugins, registered with TensorRT
tensorrt_engines.py   engines, built and run; buckets.py brings calls to the few sizes they are built for
"""
