"""Loading a language model from wherever it is, and checking that two of them can be compared."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.models.adapters import Adapter, with_adapters, without_peft
from saetools.models.builtin import BUILTINS, builtin_provenance, fetch_builtin
from saetools.models.foreign_errors import check_place, readable_errors
from saetools.models.language_model import LanguageModel, active_adapter
from saetools.models.layout import is_hooked_transformer, layout_of, layout_of_config
from saetools.models.quiet import quiet
from saetools.provenance import sha256_of_file, sha256_of_texts


def load_model(
    source: str | Path | nn.Module | LanguageModel,
    *,
    adapter: Adapter | None = None,
    tokenizer: Any = None,
    chat_template: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device_map: Any = "auto",
    quantization: Literal["8bit", "4bit"] | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model, with any PEFT adapters on top, as a `LanguageModel`.

    Args:
        source: the built-in name `smollm2-135m`; a local directory; a GGUF file; a hub id; or a model already loaded,
            which is put in eval mode: Hugging Face, PEFT, TransformerLens (`HookedTransformer`, `TransformerBridge`) or
            a `LanguageModel`.
        adapter: a PEFT adapter (directory or hub id), or several by name. The first is active; `.base` is the view
            without any and `.with_adapter(name)` another one, all on the same weights. A model that was passed in
            loaded gets the adapter's layers injected; views of it made before still see it without.
        tokenizer: a tokenizer, or where to load it from; by default the model's own.
        chat_template: a Jinja chat template, or a file that holds one, in place of the tokenizer's.
        revision: branch, tag or commit on the hub.
        dtype: `"auto"` keeps the checkpoint's.
        device_map: as in transformers.
        quantization: load in 8 or 4 bits, where bitsandbytes is installed.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: if the source does not exist, its architecture is not known, or the adapter does not fit it.
        FetchError: if files cannot be downloaded, or a licence has to be accepted first.
        IntegrityError: if weights are missing from the files.

    Example:
        >>> lm = load_model("smollm2-135m")
        >>> lm.n_layers, lm.d_model
        (30, 576)
    """
    for argument, places in (("adapter", adapter), ("tokenizer", tokenizer)):
        for place in places.values() if isinstance(places, Mapping) else (places,):
            if isinstance(place, str | Path):
                check_place(argument, place)
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(
            "dtype", expected="'auto' or one such as torch.bfloat16", received=repr(dtype), remedy="pass one of these"
        )
    if isinstance(source, nn.Module | LanguageModel):
        settings = {"revision": revision, "dtype": dtype if dtype != "auto" else None, "quantization": quantization}
        if given := [name for name, value in settings.items() if value is not None]:
            raise InputError(
                given[0],
                expected="nothing beside a loaded model",
                received="a value",
                remedy="apply it when loading the model",
            )
        lm = source if isinstance(source, LanguageModel) else _from_module(source, tokenizer)
        lm = lm if tokenizer is None else replace(lm, tokenizer=_tokenizer(tokenizer))
    else:
        lm = _from_files(
            source,
            tokenizer,
            revision=revision,
            dtype=dtype,
            device_map=device_map,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
        )
    if chat_template is not None:
        template = _read_template(chat_template)
        own_tokenizer = copy.copy(lm.tokenizer)
        own_tokenizer.chat_template = template
        lm = replace(lm, tokenizer=own_tokenizer)
    lm = replace(
        lm, provenance={**lm.provenance, "chat_template_sha256": sha256_of_texts([str(lm.tokenizer.chat_template)])}
    )
    return lm if adapter is None else with_adapters(lm, adapter)


def check_pair(base: LanguageModel, tuned: LanguageModel, texts: Sequence[str] = ()) -> None:
    """Make sure that base and tuned model can be compared token by token.

    Args:
        base: the model before the fine-tune; its tokenizer and template are used for both.
        tuned: the model after it.
        texts: rendered conversations, which both tokenizers must split alike.

    Raises:
        InputError: for different architectures, widths or depths, different token ids, or ids beyond the vocabulary of
            the tuned model.

    Warns:
        SaetoolsWarning: where only padded vocabulary, pad token or chat template differ.
    """
    if base.model is tuned.model and base.tokenizer is tuned.tokenizer:
        return

    def shape(lm: LanguageModel) -> tuple[str, int, int]:
        config: Any = getattr(lm.model, "config", None)
        return getattr(config, "model_type", type(lm.model).__name__), lm.d_model, lm.n_layers

    if shape(base) != shape(tuned):
        raise InputError(
            "tuned",
            expected="the base's architecture, width and depth {}, {}, {}".format(*shape(base)),
            received="{}, {}, {}".format(*shape(tuned)),
            remedy="compare a model with a fine-tune of itself",
        )
    for text in texts:
        ours, theirs = (lm.tokenizer(text, add_special_tokens=False)["input_ids"] for lm in (base, tuned))
        if ours != theirs:
            raise InputError(
                "tuned",
                expected="a tokenizer that gives the base's token ids",
                received=f"other ids for {text[:60]!r}",
                remedy="load the fine-tune with tokenizer=<the base's>, if its vocabulary is the same",
            )
    rows, n_ids = _vocabulary(tuned), 1 + max(base.tokenizer.get_vocab().values())
    if rows < min(n_ids, _vocabulary(base)):
        raise InputError(
            "tuned",
            expected=f"a vocabulary of {n_ids} rows, one for each id of the base's tokenizer",
            received=rows,
            remedy="compare a fine-tune that kept the base's embeddings",
        )
    differences = [
        f"{what}: {ours!r} against {theirs!r}"
        for what, ours, theirs in (
            ("vocabulary rows", _vocabulary(base), _vocabulary(tuned)),
            ("pad token", base.tokenizer.pad_token, tuned.tokenizer.pad_token),
        )
        if ours != theirs
    ]
    if base.tokenizer.chat_template != tuned.tokenizer.chat_template:
        differences.append("chat template")
    if differences:
        warnings.warn(
            "base and tuned differ in " + "; ".join(differences) + "; the base's tokenizer and template serve both",
            SaetoolsWarning,
            stacklevel=2,
        )


def _vocabulary(lm: LanguageModel) -> int:
    return next(
        parameter.shape[0] for name, parameter in lm.model.named_parameters() if "embed" in name or "wte" in name
    )


def _from_files(source: str | Path, tokenizer: Any, *, quantization: str | None, **options: Any) -> LanguageModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    name, location, provenance = _resolve(source)
    files: dict[str, Any] = {"revision": options.pop("revision"), "trust_remote_code": options.pop("trust_remote_code")}
    if location.endswith(".gguf"):
        files["gguf_file"] = Path(location).name
        location = str(Path(location).parent)
    if quantization is not None:
        options["quantization_config"] = _bitsandbytes(quantization)
    with quiet(), readable_errors("source", location):
        layout_of_config(AutoConfig.from_pretrained(location, **files))  # before gigabytes are read
        model, report = AutoModelForCausalLM.from_pretrained(location, output_loading_info=True, **files, **options)
    if missing := sorted({*report["missing_keys"], *report["mismatched_keys"]}):
        raise IntegrityError(f"{location} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    tokenizer = _tokenizer(tokenizer) if tokenizer is not None else _tokenizer(location, **files)
    commit = getattr(model.config, "_commit_hash", None)
    provenance |= {"revision": commit} if commit else {}
    provenance |= {"dtype": str(model.dtype).removeprefix("torch.")} | (
        {"quantization": quantization} if quantization else {}
    )
    return LanguageModel(model.eval(), tokenizer, name, provenance=provenance)


def _tokenizer(source: Any, **files: Any) -> Any:
    """A tokenizer as it is, or from where it is."""
    from transformers import AutoTokenizer

    if not isinstance(source, str | Path):
        return source
    with quiet(), readable_errors("tokenizer", str(source)):
        return AutoTokenizer.from_pretrained(source, **files)


def _resolve(source: str | Path) -> tuple[str, str, dict[str, Any]]:
    """Name, location for transformers, and provenance of a source given by name or path."""
    text = str(source)
    if text in BUILTINS:
        folder = fetch_builtin(text)
        return text, str(folder), {"source": text, **builtin_provenance(folder)}
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        note = {"quantization": "dequantised from GGUF", "weights_sha256": sha256_of_file(path)}
        return path.stem, str(path.resolve()), {"source": path.name, **note}
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise InputError(
            "source",
            expected="a model",
            received=f"the adapter folder {text!r}",
            remedy="load the model it was made from, with adapter=<this folder>",
        )
    if path.is_dir():
        weights = sorted(path.glob("*.safetensors"))
        return (
            path.name,
            str(path),
            {
                "source": path.name,
                "weights_sha256": {weight.name: sha256_of_file(weight) for weight in weights},
            },
        )
    check_place("source", source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise InputError(
            "source",
            expected="a built-in name (" + ", ".join(BUILTINS) + "), a directory, a .gguf file or a hub id",
            received=repr(text),
            remedy="check the path",
        )
    return text, text, {"source": text}


def _from_module(module: nn.Module, tokenizer: Any) -> LanguageModel:
    model: Any = module
    if is_hooked_transformer(model):
        tokenizer = tokenizer or model.tokenizer
    elif hasattr(model, "original_model"):  # TransformerBridge: its hooks sit inside the Hugging Face model
        tokenizer = tokenizer or model.tokenizer
        model = model.original_model
    peft: Any = None
    if hasattr(model, "get_base_model"):
        peft, model = model, without_peft(model)
    layout_of(model)
    if not is_hooked_transformer(model) and model.get_output_embeddings() is None:
        raise InputError(
            "source",
            expected="a model with an output layer",
            received=f"a {type(model).__name__}, which has none",
            remedy="load it with transformers' AutoModelForCausalLM",
        )
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or getattr(getattr(model, "cfg", None), "model_name", "") or "model"
    active = active_adapter(model)
    return LanguageModel(
        model.eval(),
        _tokenizer(name if tokenizer is None else tokenizer),
        Path(name).name,
        peft=peft,
        adapter=None if active is None else active.seen,
        provenance={"source": f"object: {name}"},
    )


def _read_template(template: str | Path) -> str:
    if isinstance(template, str) and "{" in template:
        return template
    if not Path(template).is_file():
        raise InputError(
            "chat_template",
            expected="a Jinja template or a file that holds one",
            received=repr(str(template)),
            remedy="check the path",
        )
    try:
        return Path(template).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "chat_template", expected="text in UTF-8", received=f"{template} ({error.reason})", remedy="check the file"
        ) from error


def _bitsandbytes(quantization: str) -> Any:
    import importlib.util

    from transformers import BitsAndBytesConfig

    if quantization not in ("8bit", "4bit"):
        raise InputError("quantization", expected="8bit, 4bit or None", received=repr(quantization), remedy="pick one")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "quantization",
            expected="bitsandbytes to be installed",
            received="no such package",
            remedy="`pip install bitsandbytes`, or leave quantization out",
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "8bit" else BitsAndBytesConfig(load_in_4bit=True)
