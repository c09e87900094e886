"""Activations on disk: written in shards that a killed run continues, read back memory-mapped and shuffled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saetools.activations.shuffle import Activations, SiteActivations
from saetools.activations.stream import ActivationBlock, stream_activations
from saetools.data.tokenizing import TokenizedConversation, require_tokenized, tokens_sha256
from saetools.errors import InputError, IntegrityError, NonFiniteError
from saetools.models.language_model import LanguageModel
from saetools.models.site import Site
from saetools.provenance import sha256_of_file, sha256_of_texts, versions, write_json
from saetools.room import enough_room
from saetools.team import Team

_MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class HarvestConfig:
    """How activations are read and stored."""

    dtype: str = "bfloat16"
    """Storage dtype: `bfloat16`, `float16` or `float32`."""
    batch_tokens: int = 4096
    """Padded tokens of one forward pass."""
    shard_tokens: int = 65536
    """About how many tokens a shard holds; a shard holds whole conversations."""
    skip_first: bool = True
    """Leave out first positions (attention sinks)."""


class ActivationStore:
    """A harvested store, opened for reading.

    Args:
        path: the folder that `harvest` wrote.

    Raises:
        IntegrityError: if the manifest or a shard is missing or has another size than the manifest says.
        InputError: if the harvest was not finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        if manifest is None:
            raise IntegrityError(f"{self.path} holds no readable {_MANIFEST}; harvest again")
        self.manifest: dict[str, Any] = manifest
        if not self.manifest["complete"]:
            raise InputError(
                "path",
                expected="a finished harvest",
                received=f"{len(self.manifest['shards'])} shards of an unfinished one in {self.path}",
                remedy="run the same harvest again; it continues",
            )
        _check_shards(self.path, self.manifest)

    def __len__(self) -> int:
        return sum(shard["tokens"] for shard in self.manifest["shards"])

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that were harvested."""
        return tuple(Site.parse(name) for name in self.manifest["sites"])

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return int(self.manifest["d_model"])

    def blocks(self) -> Iterator[ActivationBlock]:
        """The shards in their order, memory-mapped."""
        for index in range(len(self.manifest["shards"])):
            yield self.open_shard(index)

    def at(self, site: Site) -> SiteActivations:
        """One site of the store, as `train_sae` wants it; `StoredActivations` has several, for `train_saes`.

        Raises:
            InputError: if the site was not harvested.
        """
        return StoredActivations(self, (site,)).at(site)

    def verify(self) -> None:
        """Compare every shard's SHA-256 with the manifest.

        Raises:
            IntegrityError: naming the first shard that differs.
        """
        for shard in self.manifest["shards"]:
            if sha256_of_file(self.path / shard["file"]) != shard["sha256"]:
                raise IntegrityError(f"{self.path / shard['file']} has changed since it was written; harvest again")

    def open_shard(self, index: int) -> ActivationBlock:
        """One shard, memory-mapped."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.path / self.manifest["shards"][index]["file"]
        try:
            tensors = load_file(file)
            return ActivationBlock(
                {site: tensors[str(site)] for site in self.sites},
                tensors["token_ids"].long(),
                tensors["roles"],
                tensors["documents"].long(),
                tensors["positions"].long(),
            )
        except (OSError, SafetensorError, KeyError) as error:
            raise IntegrityError(f"cannot read {file} ({error}); harvest again") from error


class StoredActivations(Activations[tuple[int, ...]]):
    """Activations of some sites of a store, in shuffled batches; a pool is some shards.

    Args:
        store: an opened store.
        sites: of its sites; by default all.
        pool_shards: shards in memory at the same time.
    """

    def __init__(self, store: ActivationStore, sites: Sequence[Site] | None = None, *, pool_shards: int = 16) -> None:
        self.store = store
        self.sites = store.sites if sites is None else tuple(sites)
        self.pool_shards = pool_shards
        if missing := set(self.sites) - set(store.sites):
            raise InputError(
                "site",
                expected="one of " + ", ".join(store.manifest["sites"]),
                received=", ".join(map(str, missing)),
                remedy="harvest this site",
            )

    def __len__(self) -> int:
        return len(self.store)

    @property
    def reads(self) -> str:
        """What the manifest says of the tokens."""
        skip_first = self.store.manifest["config"]["skip_first"]
        return sha256_of_texts([self.store.manifest["data_sha256"], str(skip_first)])

    def pools(self, generator: torch.Generator) -> list[tuple[tuple[int, ...], int]]:
        """Groups of shards in random order."""
        sizes = [shard["tokens"] for shard in self.store.manifest["shards"]]
        order = torch.randperm(len(sizes), generator=generator).tolist()
        groups = [tuple(order[first : first + self.pool_shards]) for first in range(0, len(order), self.pool_shards)]
        return [(group, sum(sizes[index] for index in group)) for group in groups]

    def load(self, key: tuple[int, ...]) -> dict[Site, Float[Tensor, "token d_model"]]:
        """The tokens of some shards."""
        shards = [self.store.open_shard(index).acts for index in key]
        return {site: torch.cat([shard[site] for shard in shards]) for site in self.sites}


def harvest(
    lm: LanguageModel,
    sites: Sequence[Site],
    conversations: Sequence[TokenizedConversation],
    path: str | Path,
    *,
    config: HarvestConfig = HarvestConfig(),
    on_progress: Callable[[int, int], None] | None = None,
) -> ActivationStore:
    """Write the activations of conversations to disk; a run that was killed continues, to the same bytes.

    In a process group (`torchrun`), all processes call it with equal arguments and each reads its share of the shards;
    they need the same `path`.

    Args:
        lm: the model.
        sites: where to read.
        conversations: tokenised conversations or texts.
        path: folder of the store; made if missing.
        config: dtype and sizes.
        on_progress: called with tokens done and tokens in all.

    Raises:
        InputError: if the folder holds a store of something else.
        IntegrityError: if an existing shard is missing or has another size than the manifest says.
        NonFiniteError: if an activation is not finite, or does not fit the storage dtype.
        ResourceError: if memory or disk space runs out; what was written stays.
    """
    _check_config(config)
    require_tokenized(conversations)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    identity = _identity(lm, sites, conversations, config)
    manifest = _read_manifest(path)
    if manifest is None:
        manifest = {**identity, "shards": [], "complete": False}
    _check_same(manifest, identity, path)
    _check_shards(path, manifest)
    team = Team.present()
    if team.rank == 0:
        for leftover in (*path.glob("shard-*.tmp"), *path.glob(f".{_MANIFEST}.*.tmp")):
            leftover.unlink(missing_ok=True)
    team.agree(None)  # nobody writes before all have read and the leftovers are gone
    plan = _plan_shards(conversations, config.shard_tokens)
    n_tokens = [sum(len(conversations[document]) for document in documents) for documents in plan]
    for first in range(0, len(plan), team.size):
        index, entry, problem = first + team.rank, None, None
        if len(manifest["shards"]) <= index < len(plan):
            try:
                with enough_room(f"shard {index} in {path}; those before it stand"):
                    entry = _write_shard(lm, sites, conversations, plan[index], config, path, index)
            except Exception as error:
                problem = error
        team.agree(problem)
        if written := [one for one in team.gather(entry) if one is not None]:
            manifest["shards"] += written
            manifest["complete"] = len(manifest["shards"]) == len(plan)
            if team.rank == 0:
                write_json(path / _MANIFEST, manifest)
        if on_progress is not None and team.rank == 0:
            on_progress(sum(n_tokens[: first + team.size]), sum(n_tokens))
    team.agree(None)  # nobody reads before the manifest is written
    return ActivationStore(path)


def _write_shard(
    lm: LanguageModel,
    sites: Sequence[Site],
    conversations: Sequence[TokenizedConversation],
    documents: range,
    config: HarvestConfig,
    path: Path,
    index: int,
) -> dict[str, Any]:
    """Read some conversations and write them to a file; returns its entry in the manifest."""
    from safetensors.torch import save_file

    chosen = [conversations[document] for document in documents]
    stream = stream_activations(lm, sites, chosen, batch_tokens=config.batch_tokens, skip_first=config.skip_first)
    dtype = getattr(torch, config.dtype)
    tensors = _join([_as_stored(block, dtype) for block in stream], first_document=documents.start)
    file = path / f"shard-{index:05d}.safetensors"
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    entry = {"file": file.name, "tokens": len(tensors["token_ids"]), "bytes": file.stat().st_size}
    return entry | {"sha256": sha256_of_file(file)}


def _identity(
    lm: LanguageModel, sites: Sequence[Site], conversations: Sequence[TokenizedConversation], config: HarvestConfig
) -> dict[str, Any]:
    if not conversations:
        raise InputError("conversations", expected="at least one", received="none", remedy="pass what to read")

    identity = {
        "format": _FORMAT,
        "sites": [str(site) for site in sites],
        "d_model": lm.d_model,
        "model": lm.describe(),
        "data_sha256": tokens_sha256(conversations, "token_ids"),
        "roles_sha256": tokens_sha256(conversations, "roles"),
        "config": asdict(config),
        "versions": versions(),
    }
    return dict(json.loads(json.dumps(identity)))  # as it will be read back


def _check_config(config: HarvestConfig) -> None:
    if config.dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(
            "config.dtype",
            expected="bfloat16, float16 or float32",
            received=repr(config.dtype),
            remedy="pick one of these",
        )


def _check_same(manifest: Mapping[str, Any], identity: Mapping[str, Any], path: Path) -> None:
    # Another version may give other bits: it must not continue a store, but a finished one stays what it is.
    asked = [key for key in identity if key != "versions" or not manifest["complete"]]
    different = [key for key in asked if manifest.get(key, identity[key]) != identity[key]]
    if different:
        raise InputError(
            "path",
            expected="an empty folder or a store of the same harvest",
            received=f"{path}, which differs in {', '.join(different)}",
            remedy="choose another folder",
        )


def _plan_shards(conversations: Sequence[TokenizedConversation], shard_tokens: int) -> list[range]:
    plan, start, size = [], 0, 0
    for index, conversation in enumerate(conversations):
        size += len(conversation)
        if size >= shard_tokens or index == len(conversations) - 1:
            plan.append(range(start, index + 1))
            start, size = index + 1, 0
    return plan


def _as_stored(block: ActivationBlock, dtype: torch.dtype) -> ActivationBlock:
    acts = {site: values.to("cpu", dtype) for site, values in block.acts.items()}
    for site, values in acts.items():
        if dtype == torch.float16 and not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"activations at {site} are too large for float16; harvest in bfloat16 or float32")
    return replace(block, acts=acts)


def _join(blocks: Sequence[ActivationBlock], *, first_document: int) -> dict[str, Tensor]:
    documents = torch.cat([block.documents for block in blocks])
    positions = torch.cat([block.positions for block in blocks])
    order = torch.argsort(documents * (int(positions.max()) + 1 if len(positions) else 1) + positions)
    tensors = {str(site): torch.cat([block.acts[site] for block in blocks])[order] for site in blocks[0].acts}
    tensors["token_ids"] = torch.cat([block.token_ids for block in blocks])[order].int()
    tensors["roles"] = torch.cat([block.roles for block in blocks])[order]
    tensors["documents"] = (documents[order] + first_document).int()
    tensors["positions"] = positions[order].int()
    return tensors


def _check_shards(path: Path, manifest: Mapping[str, Any]) -> None:
    for shard in manifest["shards"]:
        file = path / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            raise IntegrityError(f"{file} is missing or damaged; harvest again into a new folder")


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise InputError(
                "path",
                expected=f"a store of format {_FORMAT}",
                received=f"format {manifest['format']!r} in {path}",
                remedy="read it with the version of saetools that wrote it, or harvest again",
            )
        if missing := {"sites", "d_model", "shards", "complete"} - set(manifest):
            raise KeyError(*missing)
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path / _MANIFEST} is damaged ({error}); harvest again into a new folder") from error
    return manifest
