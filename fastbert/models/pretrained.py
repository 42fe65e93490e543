"""What the models of all families share: loading, saving, initialising. It knows no architecture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fastbert.hub import resolve
from fastbert.models.config import Config
from fastbert.models.layer_stack import LayerStack
from fastbert.models.loading import take_over
from fastbert.models.outputs import ModelOutput
from fastbert.weights import load_weights, read_json, save_weights

M = TypeVar("M", bound="PreTrainedModel")


class PreTrainedModel(nn.Module):
    """A model with a configuration, that reads and writes Hugging Face's checkpoints."""

    config_class: ClassVar[type[Config]]
    base_model_prefix: ClassVar[str]
    # Roots of modules that a checkpoint may lack, or have beyond this model: heads. They are reported, not fatal.
    head_roots: ClassVar[tuple[str, ...]] = ()
    # Parameters that are one and the same where `tie_word_embeddings` is set: name -> name of the one it follows.
    tied_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(f"{type(self).__name__} needs a {self.config_class.__name__}, got {type(config).__name__}")
        self.config: Any = config

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first parameter."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, shared ones counted once; on request without the tables of embeddings."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        wanted = (p for p in self.parameters() if (p.requires_grad or not only_trainable) and id(p) not in tables)
        return sum(p.numel() for p in wanted)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only the input of every `every_n_layers`-th layer in training, and run those again in backward.

        Args:
            gradient_checkpointing_kwargs: go to `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False.

        Raises:
            ValueError: `offload`, which is not supported, or `every_n_layers` below 1.
        """
        if offload or every_n_layers < 1:
            raise ValueError(f"offload is {offload} (unsupported), every_n_layers is {every_n_layers} (1 or more)")
        for stack in self._layer_stacks():
            stack.checkpoint_kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
            stack.checkpoint_every = every_n_layers

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        for stack in self._layer_stacks():
            stack.checkpoint_kwargs = None

    activation_checkpointing_disable = gradient_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again in backward."""
        return any(stack.checkpoint_kwargs is not None for stack in self._layer_stacks())

    def _layer_stacks(self) -> list[LayerStack]:
        return [module for module in self.modules() if isinstance(module, LayerStack)]

    def finish(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output itself, or its tuple where `return_dict` (None = as the configuration says) is False."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of word embeddings."""
        raise NotImplementedError(f"{type(self).__name__} names no table of word embeddings")

    def set_input_embeddings(self, table: nn.Embedding) -> None:
        """Replace the table of word embeddings."""
        raise NotImplementedError(f"{type(self).__name__} names no table of word embeddings")

    def get_output_embeddings(self) -> nn.Linear | None:
        """The linear that makes vocabulary logits, if the model has one."""
        return None

    def tie_weights(self) -> None:
        """Make each tied parameter the one it follows, if the configuration ties them."""
        for name, source in self.active_tied_keys().items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, self.get_parameter(source))

    def active_tied_keys(self) -> dict[str, str]:
        """`tied_keys`, or nothing where the configuration does not tie."""
        return self.tied_keys if self.config.tie_word_embeddings else {}

    def post_init(self) -> None:
        """Tie and initialise: the last line of a model's constructor."""
        self.tie_weights()
        self.init_weights()
        self.register_state_dict_post_hook(_copy_tied)

    def init_weights(self) -> None:
        """Fresh weights: normal(0, initializer_range), zero biases, unit layer norms, a zero padding row."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: torch.Tensor) -> None:
        """A fresh value for one parameter, in place."""
        if name.endswith("bias"):
            parameter.zero_()
        elif name.lower().endswith(("layernorm.weight", "layer_norm.weight")):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, self.config.initializer_range)
            owner = self.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.Embedding) and owner.padding_idx is not None:
                parameter[owner.padding_idx].zero_()

    @classmethod
    def from_pretrained(
        cls: type[M],
        name: str | os.PathLike[str],
        *,
        config: Config | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        ignore_unexpected: Sequence[str] = (),
        output_loading_info: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Any:
        """Load a checkpoint; the model is returned in `eval()` mode.

        Args:
            name: a folder, or a hub id (see `fastbert.hub.resolve` for where it is looked for).
            config: instead of the folder's `config.json`.
            dtype: a torch dtype or its name; None or "auto" keeps the file's. `torch_dtype` is the old name of it.
            device: where the weights go; None = CPU.
            ignore_unexpected: prefixes of weights in the file that are to be left out without an error.
            output_loading_info: also return a dict with `missing_keys` and `unexpected_keys`.
            options: fields of the configuration to override (`num_labels=3`), or arguments of the model's
                constructor (`add_pooling_layer=False`).

        Raises:
            FileNotFoundError: no such model (the message lists what was tried) or no weight file.
            ValueError: a corrupt file, a weight that the encoder lacks or no part of the model knows, or shapes that do
                not match the configuration.
        """
        dtype = options.pop("torch_dtype", dtype)
        folder = resolve(name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        arguments = {k: options.pop(k) for k in ("add_pooling_layer",) if k in options}
        if config is None:
            config = cls.config_class.from_dict(read_json(folder / "config.json"), **options)
        elif options:
            config = config.replace(**options)
        with torch.device("meta"):
            model = cls(config, **arguments)
        info = take_over(model, load_weights(folder), tuple(ignore_unexpected), str(folder))
        if dtype not in (None, "auto"):
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        model.to(device or "cpu").eval()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write `config.json` and `model.safetensors` (sharded past `max_shard_size`) with Hugging Face's names.

        Each file is replaced atomically: a folder that held a good checkpoint never holds half a new one.
        """
        path = Path(folder)
        if path.is_file():
            raise NotADirectoryError(f"cannot save to {path}: it is a file, not a folder")
        state = self.state_dict()
        path.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(
            path, architectures=[type(self).__name__], dtype=str(self.dtype).removeprefix("torch.")
        )
        for name in self.active_tied_keys():
            del state[name]
        save_weights(state, path, max_shard_size)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grow or shrink the vocabulary: the word table, a tied or separate decoder, its bias, the configuration.

        Args:
            new_num_tokens: rows wanted; None keeps the number (and only pads it).
            pad_to_multiple_of: round the number up to a multiple of this.
            mean_resizing: new rows are the mean of the old ones (plus noise of 1e-4 of their spread), so that new
                logits start out ordinary; False draws them like fresh weights.

        Returns:
            The new table.

        Raises:
            ValueError: a size below 1.
        """
        old: nn.Embedding = self.get_input_embeddings()
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size < 1:
            raise ValueError(f"the vocabulary needs at least 1 row, got new_num_tokens={new_num_tokens}")
        table = nn.Embedding(
            size, old.embedding_dim, padding_idx=old.padding_idx, _weight=self._resized(old.weight, size, mean_resizing)
        )
        self.set_input_embeddings(table.train(old.training))
        decoder = self.get_output_embeddings()
        if decoder is not None:
            decoder.weight = nn.Parameter(self._resized(decoder.weight, size, mean_resizing))
            decoder.bias = nn.Parameter(self._resized(decoder.bias, size, mean_resizing))
            decoder.out_features = size
            for name, source in self.tied_keys.items():
                if name.endswith("decoder.bias"):  # the bias that the decoder's follows where they are tied
                    owner, _, leaf = source.rpartition(".")
                    bias = self._resized(self.get_parameter(source), size, mean_resizing)
                    setattr(self.get_submodule(owner), leaf, nn.Parameter(bias))
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = module.config.replace(vocab_size=size)
        self.tie_weights()
        return table

    @torch.no_grad()
    def _resized(self, old: torch.Tensor, size: int, mean_resizing: bool) -> torch.Tensor:
        new = old.new_empty(size, *old.shape[1:])
        kept = min(size, old.shape[0])
        new[:kept] = old[:kept]
        if size > kept:
            mean, spread = (old.mean(0), old.std(0) * 1e-4) if mean_resizing else (0.0, self.config.initializer_range)
            new[kept:] = mean + spread * torch.randn_like(new[kept:])
        return new


def _copy_tied(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    """Give tied entries of a state dict memory of their own: safetensors refuses two names for one tensor."""
    assert isinstance(module, PreTrainedModel)
    for name in (prefix + key for key in module.active_tied_keys()):
        if name in state:
            state[name] = state[name].clone()
