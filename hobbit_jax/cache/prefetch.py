"""Which experts later layers will need, guessed while an earlier one waits.

Owns the predictors. Only the decode program can ask later layers' routers of the stream as it
stands, so their choices are handed in.

Sources: layer-ahead, Eliseev & Mazur (arXiv 2312.17238, section 3.2) and HOBBIT (arXiv 2411.01433,
section 3.3), both of which apply the next gate to the current stream.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from hobbit_jax.cache.controller import Decision, Observer
from hobbit_jax.experts.store import ExpertKey

PredictorName = Literal["layer_ahead", "previous_token", "random"]


@dataclass(frozen=True)
class PrefetchRule:
    """Who guesses, and how far.

    "layer_ahead" asks the routers of the layers to come; "previous_token" takes the experts that
    those layers used for the token before; "random" is the control: as many missing experts as
    layer_ahead would load, drawn from all that are missing.
    """

    predictor: PredictorName
    distance: int = 1  # layers ahead of the one that waits

    def __post_init__(self):
        if self.predictor not in get_args(PredictorName) or self.distance < 1:
            raise ValueError(
                f"{self}; want a predictor of {', '.join(get_args(PredictorName))} and a "
                "distance of at least 1"
            )

    @property
    def layers_asked(self) -> int:
        """Layers ahead whose routers the decode program applies."""
        return 0 if self.predictor == "previous_token" else self.distance


class Prefetcher(Observer):
    """Guesses missing experts, the nearest layer's first."""

    def __init__(self, rule: PrefetchRule, n_layers: int, n_experts: int):
        self.rule = rule
        self._n_experts, self._random = n_experts, random.Random(0)
        self._previous: list[list[ExpertKey]] = [[] for _ in range(n_layers)]

    def after_step(self, decision: Decision) -> None:
        """See `Observer.after_step`: records what a layer uses for the token at hand."""
        if not decision.prefill:
            self._previous[decision.step.layer] = [use.key for use in decision.uses]

    def guess(
        self, layer: int, routed: Sequence[ExpertKey], is_resident: Callable[[ExpertKey], bool]
    ) -> list[ExpertKey]:
        """Guesses while `layer` waits; `routed` is what later layers' routers choose of it now.

        Before a token the layer is -1, and no router knows anything yet.
        """
        if self.rule.predictor == "previous_token":
            later = self._previous[layer + 1 : layer + 1 + self.rule.distance]
            routed = [key for keys in later for key in keys]
        guesses = [key for key in routed if not is_resident(key)]
        if self.rule.predictor != "random":
            return guesses
        drawn: dict[ExpertKey, None] = {}
        for key in guesses:
            others = (key._replace(expert=expert) for expert in range(self._n_experts))
            missing = [other for other in others if not is_resident(other) and other not in drawn]
            drawn[self._random.choice(missing)] = None
        return list(drawn)
