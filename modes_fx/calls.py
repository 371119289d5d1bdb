"""Which call of a model is running in this thread, read off the stack.

What one graph learns about a call's tokens is good for the graphs of the same call, and a call ends unseen:
it may return, or raise anywhere. So the frame of the call is marked, among its `f_locals`, where a mark lives
as long as the frame. Nothing has to be cleaned up, and no other call or thread can meet it.
"""

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn

_MODULE_FILE = nn.Module._call_impl.__code__.co_filename
_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl")


def running_modules() -> Iterator[tuple[FrameType, nn.Module]]:
    """The module calls on this thread's stack, innermost first, each with its frame.

    Only torch's own frames are looked at. Their locals are the arguments, which live as long as the call
    anyway; reading `f_locals` of another frame would keep its activations alive (before Python 3.13).
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Dynamo runs frames with code of its own, under the name and file of the original.
        code = frame.f_code
        module = None
        if code.co_name in _MODULE_CALLS and code.co_filename == _MODULE_FILE:
            module = frame.f_locals.get("self")
        elif code.co_name == "compile_wrapper":
            # torch.compile(model.forward) calls no module, but a method of one.
            module = getattr(frame.f_locals.get("fn"), "__self__", None)
        if isinstance(module, nn.Module):
            yield frame, module
        frame = frame.f_back


def mark(frame: FrameType, key: str, value: object) -> None:
    """Mark a running call; the mark goes when the call ends, however it ends."""
    frame.f_locals[key] = value


def is_marked(key: str, value: object) -> bool:
    """Whether a call that is running in this thread bears this mark."""
    return any(frame.f_locals.get(key) is value for frame, _ in running_modules())
