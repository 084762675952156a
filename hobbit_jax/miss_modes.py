"""What serves a selection whose copy is not resident: the miss modes.

Owns the rule per selection, as array code that sees which tiers of an expert are resident. Called
inside compiled programs (`selection.py`); what the host does about it (fetching, promoting) is the
engine's. Sources: HOBBIT (arXiv 2411.01433, section 3.2) for thresholds on a miss.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class MissMode:
    """Waits for the tier that was asked for; the others change `serve`."""

    def serve(self, asked_TK: jax.Array, weights_TK: jax.Array, resident_tTK: jax.Array):
        """The tier that serves each selection, int32 [T, K].

        Args:
            asked_TK: int32, the plan's tiers.
            weights_TK: float32, the router's weights, heaviest first.
            resident_tTK: bool, whether each tier's copy of the chosen expert is resident.
        """
        return asked_TK


WAIT = MissMode()
