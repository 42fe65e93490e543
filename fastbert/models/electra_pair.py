"""ELECTRA's pretraining model: a small generator and the discriminator, which share their embeddings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert.hub import resolve
from fastbert.models.electra import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, ElectraModel

GENERATOR = "generator"  # the generator's folder inside the discriminator's


def generator_config(config: ElectraConfig, fraction: float = 0.25) -> ElectraConfig:
    """A generator that is `fraction` as wide as the discriminator, and as deep (Clark et al. 2020, sec. 3.2).

    The hidden size is rounded, the feed-forward size is 4 times it and a head has 64 features, or as near above it as
    divides the hidden size.

    Args:
        config: the discriminator's.
        fraction: 1/4 for small and large, 1/3 for base.

    Raises:
        ValueError: a fraction that leaves nothing, or more than the discriminator.
    """
    hidden = round(config.hidden_size * fraction)
    if not 1 <= hidden <= config.hidden_size:
        raise ValueError(
            f"fraction {fraction} of hidden_size {config.hidden_size} is {hidden}: "
            f"it must lie between 1 and {config.hidden_size}"
        )
    heads = max(n for n in range(1, max(1, hidden // 64) + 1) if hidden % n == 0)
    return config.replace(hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden)


class ElectraPair(nn.Module):
    """Generator and discriminator (Clark et al. 2020, arXiv 2003.10555, sec. 2).

    Word, position and segment embeddings and their layer norm are one module in both, as in the authors' code; each has
    a projection of its own to its hidden size, and the generator's vocabulary head is tied to the words.

    Attributes:
        discriminator: what is kept after pretraining.
        generator: a masked language model that proposes replacements.
    """

    def __init__(self, discriminator: ElectraForPreTraining, generator: ElectraForMaskedLM) -> None:
        """
        Raises:
            ValueError: tables of embeddings of different shapes.
        """
        super().__init__()
        shapes = [
            {name: tuple(p.shape) for name, p in model.electra.embeddings.named_parameters()}
            for model in (discriminator, generator)
        ]
        for name, shape in shapes[0].items():
            if shapes[1].get(name) != shape:
                raise ValueError(
                    f"generator and discriminator share their embeddings, but {name} has shape {shapes[1].get(name)} "
                    f"in the generator and {shape} in the discriminator"
                )
        self.discriminator = discriminator
        self.generator = generator
        generator.electra.embeddings = discriminator.electra.embeddings
        generator.tie_weights()

    @classmethod
    def from_config(cls, config: ElectraConfig, fraction: float = 0.25) -> ElectraPair:
        """Fresh weights; `config` is the discriminator's, see `generator_config`."""
        return cls(ElectraForPreTraining(config), ElectraForMaskedLM(generator_config(config, fraction)))

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], generator: str | os.PathLike[str] | None = None, **options: Any
    ) -> ElectraPair:
        """From a folder that `save_pretrained` wrote, or from two checkpoints; in `eval()` mode.

        Args:
            name: the discriminator's folder or hub id.
            generator: the generator's; None = the folder `generator` in the discriminator's.
            options: as `PreTrainedModel.from_pretrained`, for both.
        """
        hub = {k: options[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in options}
        inner = resolve(name, **hub) / GENERATOR if generator is None else generator
        return cls(
            ElectraForPreTraining.from_pretrained(name, **options), ElectraForMaskedLM.from_pretrained(inner, **options)
        ).eval()

    def save_pretrained(self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write the discriminator into `folder` and the generator into `folder/generator`."""
        self.discriminator.save_pretrained(folder, max_shard_size)
        self.generator.save_pretrained(Path(folder) / GENERATOR, max_shard_size)

    @property
    def base_model(self) -> ElectraModel:
        """The discriminator's encoder."""
        return self.discriminator.electra

    @property
    def config(self) -> ElectraConfig:
        """The discriminator's."""
        return self.discriminator.config

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return self.discriminator.device

    def num_parameters(self) -> int:
        """Of both, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """See `PreTrainedModel.gradient_checkpointing_enable`; for both."""
        self.discriminator.gradient_checkpointing_enable(**options)
        self.generator.gradient_checkpointing_enable(**options)
