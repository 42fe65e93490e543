"""What the models of all families share: loading, saving, initialising. It knows no architecture."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fastbert.hub import resolve
from fastbert.models.config import Config
from fastbert.models.outputs import ModelOutput
from fastbert.weights import legacy_names, load_weights, match_names, nearest, read_json, save_weights

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

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

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

    def init_weights(self) -> None:
        """Fresh weights: normal(0, initializer_range), zero biases, unit layer norms, a zero padding row."""
        for name, parameter in self.named_parameters():
            self._init_parameter(name, parameter)

    @torch.no_grad()
    def _init_parameter(self, name: str, parameter: torch.Tensor) -> None:
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
            KeyError: the encoder lacks a weight, or the file has one that no part of the model knows.
            ValueError: a corrupt file, or shapes that do not match the configuration.
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
        info = model._load(load_weights(folder), tuple(ignore_unexpected), str(folder))
        if dtype not in (None, "auto"):
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        model.to(device or "cpu").eval()
        return (model, info) if output_loading_info else model

    def _load(self, state: dict[str, torch.Tensor], ignored: tuple[str, ...], source: str) -> dict[str, list[str]]:
        """Take over a checkpoint's tensors (they are not copied); parameters without one are initialised."""
        legacy_names(state)
        expected = {k: v.shape for k, v in self.state_dict().items()}
        prefix = self.base_model_prefix + "."
        missing, unexpected = match_names(state, expected, prefix)
        for name, source_name in self.active_tied_keys().items():
            present = [k for k in (name, source_name) if k in state]
            if len(present) == 1:  # files hold either one of a tied pair, or both
                state.setdefault(name, state[present[0]])
                state.setdefault(source_name, state[present[0]])
                missing = [k for k in missing if k not in (name, source_name)]
        roots = tuple(f"{p}{root}." for root in self.head_roots for p in ("", prefix))
        heads = (*roots, *ignored)
        fatal = [k for k in unexpected if not k.startswith(heads)]
        if fatal:
            more = f" and {len(fatal) - 1} more" if len(fatal) > 1 else ""
            raise KeyError(
                f"{source} has the weight {fatal[0]}{more}, which {type(self).__name__} does not know"
                f"{nearest(fatal[0], expected)}. Is config.json the right one? "
                f"To leave it out: from_pretrained(..., ignore_unexpected=[{fatal[0].split('.')[0] + '.'!r}])"
            )
        fatal = [k for k in missing if not k.startswith(roots)]
        if fatal:
            more = f" and {len(fatal) - 1} more" if len(fatal) > 1 else ""
            raise KeyError(
                f"{source} lacks the weight {fatal[0]}{more} of {type(self).__name__}"
                f"{nearest(fatal[0], unexpected or state)}. Is config.json the right one?"
            )
        for key in unexpected:
            del state[key]
        for key, tensor in state.items():
            if tensor.shape != expected[key]:
                raise ValueError(
                    f"{source}: {key} has shape {tuple(tensor.shape)} in the file but {tuple(expected[key])} by the "
                    "configuration: config.json and the weights do not belong together"
                )
        if missing:
            warnings.warn(
                f"{source} has no weights for {', '.join(missing)}: they are initialised at random, train before use",
                stacklevel=3,
            )
        self.load_state_dict(state, strict=False, assign=True)
        for name, parameter in list(self.named_parameters()):
            if parameter.is_meta:
                fresh = nn.Parameter(torch.empty_like(parameter, device="cpu"))
                self._init_parameter(name, fresh)
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, fresh)
        self.tie_weights()
        return {"missing_keys": missing, "unexpected_keys": unexpected}

    def save_pretrained(self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write `config.json` and `model.safetensors` (sharded past `max_shard_size`) with Hugging Face's names.

        Each file is replaced atomically: a folder that held a good checkpoint never holds half a new one.
        """
        path = Path(folder)
        if path.is_file():
            raise NotADirectoryError(f"cannot save to {path}: it is a file, not a folder")
        path.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(
            path, architectures=[type(self).__name__], dtype=str(self.dtype).removeprefix("torch.")
        )
        state = self.state_dict()
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
        self.set_input_embeddings(table)
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
