"""A model with a profile at work, and what it skipped."""

import os
from collections.abc import Callable
from typing import Any, Literal, get_args

from modes_fx.attach import attach
from modes_fx.backend import backend
from modes_fx.errors import ModesError
from modes_fx.profile import Profile
from modes_fx.skipping import Counts

How = Literal["attach", "compile"]


def start_skipping(model: Any, profile: Profile | str | os.PathLike[str], how: How) -> Callable[[], Counts]:
    """Make `model`, its `generate()` included, skip what the profile drops, for good.

    Args:
        model: An eager transformers model.
        profile: A `Profile`, or the path of one.
        how: `attach` runs uncompiled; `compile` compiles the model in place, which takes longer to start,
            again for new shapes, and then runs faster.
    Returns:
        What gives the pairs and dropped pairs so far.
    """
    if how not in get_args(How):
        raise ModesError(f"how must be attach or compile, got {how!r}.")
    if how == "attach":
        return attach(model, profile, counting=True).counts
    made = backend(profile, counting=True)
    model.compile(backend=made, dynamic=None)
    return made.counts
