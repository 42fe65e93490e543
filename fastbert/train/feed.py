"""From a dataset to the loader of one rank."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbert.train.arguments import TrainArguments
from fastbert.train.distributed import World
from fastbert.train.layers import encoders
from fastbert.train.loader import Loader
from fastbert.train.objectives.loss import Objective


def loader_of(data: Any, model: nn.Module, objective: Objective, arguments: TrainArguments, world: World) -> Any:
    """`data` itself where it is a loader already, or a `Loader` of it with the sizes that the arguments give."""
    if hasattr(data, "steps"):
        return data
    bases, sizes = encoders(model), arguments.items_or_tokens
    return Loader(
        data,
        batch_items=sizes["batch_items"],
        batch_tokens=sizes["batch_tokens"],
        micro_tokens=arguments.micro_tokens,
        position_offset=bases[0].position_offset if bases else 0,
        token_fields=objective.token_fields,
        seed=arguments.seed,
        drop_last=arguments.drop_last,
        rank=world.rank,
        world_size=world.size,
    )
