"""What "anderson_history" keeps of the denoising step before: Anderson acceleration over true iterates (GAG, eq. 6).

GAG 3.5: one attention layer has no history, "the missing F(x_{k-1}) must be approximated by a proxy". Over denoising
steps there is one: each module keeps its query x and its T_s(x) of the step before, and weighs both by the least
squares of their residuals T_s(x) - x, m = 1.

The model says before each call at what timestep it is, and in which of the calls of a step that a pipeline names
(`cache_context`, where CFG takes two); in a batch of two each row has its own history. Where the timestep does not fall
a run begins, which knows nothing of the one before. A second call at the same timestep, of a scheduler of second order
or of a weakened guidance branch, neither has a history nor becomes one; nor does a step at which a schedule has the
operator switched off. All of it is tensors written in place, so a compiled graph stays whole; it is compiled a second
time when the first tensors are there.

Costs two tensors of the output's size for each module and each call of a step, in its dtype. Nothing of it is saved.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.combined import share_of_before
from .operators import Unit

_MOST_KINDS = 4  # of calls, by name and shape, whose last step is kept


class Clock:
    """When and in which call of a step a model is, for all modules of the model that keep a history.

    place, name: where among the arguments of forward() its timestep stands, and what it is called there; rises: that it
    does while noise falls.
    """

    def __init__(self, place: int, name: str = "timestep", rises: bool = False) -> None:
        self.place, self.name, self.rises = place, name, rises
        self.timestep: Tensor | None = None  # float32, no dimensions
        self.call: str | None = None

    def __call__(self, model: nn.Module, arguments: tuple, named: Mapping[str, Any]) -> None:
        """Take the time from a call's arguments: a forward_pre_hook of the model."""
        timestep = named[self.name] if self.name in named else arguments[self.place]
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, dtype=torch.float32)
        timestep = timestep.detach().to(torch.float32).amax()
        self.timestep = -timestep if self.rises else timestep


class History:
    """What one module keeps: {(call of a step, shape): (query, output, timestep)}. clock: its model's."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock(0)
        self.kept: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}

    def accelerated(self, query: Tensor, output: Tensor, scale: Tensor, unit: Unit) -> Tensor:
        """T_s of this step, `output`, moved to Anderson's combination with that of the step before; keeps both.

        query: the attention's query, x; output: (batch, heads, queries, head_dim), both. scale: how far it is moved, 0
        is not at all. unit: what shares its weights. Returns `output` where nothing says at what timestep the model is.
        """
        if self.clock.timestep is None:
            return output
        now = self.clock.timestep.to(output.device)
        kind = (self.clock.call, tuple(output.shape))
        kept = self.kept.get(kind)
        if kept is None or kept[1].device != output.device or kept[1].dtype != output.dtype:
            kept = (torch.zeros_like(query), torch.zeros_like(output), torch.full_like(now, float("-inf")))
            while len(self.kept) >= _MOST_KINDS:
                del self.kept[next(iter(self.kept))]
            self.kept[kind] = kept
        query_before, output_before, before = kept
        exact, exact_before = output.float(), output_before.float()
        share = share_of_before(query.float(), exact, query_before.float(), exact_before, unit)
        moved = exact + scale.to(output.device) * share * (exact_before - exact)
        moved = torch.where(now < before, moved, exact).to(output.dtype)
        with torch.no_grad():
            again = now == before
            query_before.copy_(torch.where(again, query_before, query))
            output_before.copy_(torch.where(again, output_before, output))
            before.copy_(torch.where(scale.to(now.device) == 0.0, float("-inf"), now))
        return moved
