"""Models by name: published weights, folders and repositories with config.json and model.safetensors side by side.

The two files have the format of huggingface_hub's `PyTorchModelHubMixin` for a class whose argument `config` is a dataclass,
and each side reads the other's files. The mixin is not a base class here, so that `import fused` needs no huggingface_hub.
Beside the fields of `VideoMambaConfig`, config.json holds the class names as `id2label` and `label2id`, and the section
`preprocessing`, the fields of `Preprocessing`; both may be absent.
"""

import difflib
import json
import os
import re
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fused.io.atomic_write import atomic_write
from fused.io.checkpoint_file import CheckpointError, save_checkpoint
from fused.io.preprocessing import Preprocessing
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.labels import Labelled, labels_from_json, labels_to_json
from fused.models.videomamba.load import load_checkpoint
from fused.models.videomamba.published import PRETRAINED

T = TypeVar("T", bound="Pretrained")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FOLLOWED = {"num_frames": "frames", "img_size": "size"}  # fields of the configuration, and those of `Preprocessing` beside them
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".tar", ".json", ".yaml")


class NotDownloaded(ConnectionError):
    """The error for a file that is neither in the cache nor can be downloaded; the attribute `url` is its address."""

    def __init__(self, message: str, url: str) -> None:
        super().__init__(message)
        self.url = url


class Pretrained:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a model that is built from a `VideoMambaConfig`."""

    config: VideoMambaConfig
    preprocessing: Preprocessing | None = None  # how clips are made for this model; None: unknown

    @classmethod
    def from_pretrained(
        cls: type[T],
        source: str | Path,
        *,
        backend: str = "auto",
        which: str = "model",
        strict: bool = True,
        inflate: str = "centre",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> T:
        """Return a model on the CPU, in eval mode, with weights.

        `source` is a name in `fused.PRETRAINED`, a folder that `save_pretrained` wrote (~ is the home folder), or a
        repository of such files on the Hugging Face hub, by its name owner/name. What can be a path only (`is_path`) is never
        asked of the hub. `overrides` are fields of the configuration that differ from the trained model's, such as
        num_classes, num_frames or img_size; weights are converted as by `load_checkpoint`, which takes `which`, `strict` and
        `inflate` and logs what it did. `revision`, `cache_dir`, `token` and `local_files_only` are huggingface_hub's.

        The model's `labels` and `preprocessing` are the folder's. With another num_classes, labels is None; the
        preprocessing's frames and size follow num_frames and img_size.

        Raises ValueError for a wrong configuration or name, TypeError for a field that it does not have, ImportError without
        huggingface_hub (safetensors), CheckpointError for files that do not fit, FileNotFoundError for a missing folder and
        for a folder without the files, NotDownloaded, a ConnectionError, if a file can neither be downloaded nor is in the
        cache.

            >>> model = VideoMamba.from_pretrained("videomamba_t16_k400_f16_res224", num_classes=10)
        """
        remote = {
            "revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only
        }  # fmt: skip
        folder = Path(os.path.expanduser(source))
        if str(source) in PRETRAINED:
            published = PRETRAINED[str(source)]
            trained, weights = Description(published.config), download(published.repository, published.file, remote)
        elif folder.is_dir():
            trained, weights = read_description(folder / CONFIG), folder / WEIGHTS
        elif folder.exists():
            name = repr(str(source))
            raise ValueError(f"source is {name}, a file; allowed: a folder; load_checkpoint(model, {name}) reads a file")
        elif isinstance(source, Path) or is_path(source):
            raise FileNotFoundError(2, "there is no such folder", str(folder))
        elif _REPOSITORY.fullmatch(source):
            try:
                trained = read_description(download(source, CONFIG, remote))
                weights = download(source, WEIGHTS, remote)
            except NotDownloaded as error:
                raise NotDownloaded(f"there is no folder {source}; {error}", error.url) from error.__cause__
        else:
            kinds = "no folder, no repository (owner/name) and no published model"
            raise ValueError(f"{source!r} is {kinds}; {near_names(source)}")
        model: Any = cls(replace(trained.config, **overrides), backend=backend)  # type: ignore[call-arg]
        load_checkpoint(model, weights, which=which, strict=strict, inflate=inflate, grid=trained.config.grid)
        if isinstance(model, Labelled) and model.config.num_classes == trained.config.num_classes:
            model.labels = trained.labels
        if trained.preprocessing is not None:
            changes = {FOLLOWED[key]: getattr(model.config, key) for key in overrides if key in FOLLOWED}
            model.preprocessing = replace(trained.preprocessing, **changes)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors, each atomically, and return the folder.

        `labels` and `preprocessing` are kept too, in config.json. Raises ImportError without safetensors, OSError if the disk
        is full; the old files stay then.
        """
        description = asdict(replace(self.config, pretrained=None))
        if isinstance(self, Labelled) and self.labels is not None:
            description |= labels_to_json(self.labels)
        if self.preprocessing is not None:
            description["preprocessing"] = asdict(self.preprocessing)
        folder = Path(os.path.expanduser(folder))
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / CONFIG) as draft:
            draft.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            save_checkpoint(self, folder / WEIGHTS)  # type: ignore[arg-type]
        return folder

    def push_to_hub(
        self, repository: str, *, token: str | bool | None = None, private: bool | None = None, message: str = "Weights"
    ) -> str:
        """Upload the files of `save_pretrained` to a repository, which is made if missing, and return the commit's URL.

        `token` and `private` are huggingface_hub's, `message` is the commit's. Raises ImportError without huggingface_hub, and
        its own errors.
        """
        api = _hub().HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))


class Description(NamedTuple):
    """The content of config.json."""

    config: VideoMambaConfig
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None


def read_description(path: Path) -> Description:
    """Return the content of a config.json.

    Raises CheckpointError for a file that is no configuration, and for unknown fields and wrong values too: the model would
    be another one. Raises FileNotFoundError.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        labels, preprocessing = given.pop("id2label", None), given.pop("preprocessing", None)
        given.pop("label2id", None)  # says the same as id2label
        config = VideoMambaConfig(**with_tuples(given))
        return Description(
            config,
            None if labels is None else labels_from_json(labels, config.num_classes),
            None if preprocessing is None else Preprocessing(**with_tuples(preprocessing)),
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(2, f"the folder{_of_a_run(path.parent)} holds no configuration", str(path)) from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:  # no JSON, no UTF-8, or a wrong value
        raise CheckpointError(f"{path} is no configuration of a VideoMamba: {error}") from error


def _of_a_run(folder: Path) -> str:
    """Return where the model is of a folder that is that of a training, or of a checkpoint of it; nothing for another."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if (run / "model" / CONFIG).is_file():
        return f" (of a run; its model is in {run / 'model'})"
    if (run / "checkpoints").is_dir():
        return " (of a run that has no model yet; epochs=null steps=N, of its last checkpoint, writes one)"
    return ""


def with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with tuples, which JSON does not have, in place of lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def is_path(source: str) -> bool:
    """Return whether a name can be a path only, and no repository of the hub.

    A path begins with a dot, a slash or ~, has several slashes or a backslash, ends with a slash or like a file of weights,
    or is in a folder that is there.
    """
    if source.startswith((".", "/", "~")) or source.endswith(("/", *_FILE_SUFFIXES)) or "\\" in source:
        return True
    return source.count("/") > 1 or ("/" in source and Path(source).parent.is_dir())


def near_names(source: str) -> str:
    """Return a sentence with the published models whose names are near an unknown one."""
    near = [name for name in PRETRAINED if source in name] or difflib.get_close_matches(source, PRETRAINED, 8)
    return f"published are {', '.join(near[:8])}" if near else "the published ones are the keys of fused.PRETRAINED"


def download(repository: str, file: str, remote: dict[str, Any] | None = None) -> Path:
    """Return a file's path in huggingface_hub's cache, downloaded if missing. Raises NotDownloaded if that fails."""
    hub = _hub()
    try:
        return Path(hub.hf_hub_download(repository, file, **(remote or {})))
    except Exception as error:  # the causes have no common class: offline, no such repository, no such file, proxies
        url = f"https://huggingface.co/{repository}/resolve/main/{file}"
        raise NotDownloaded(
            f"{file} of {repository} could not be downloaded and is not in the cache ({type(error).__name__}: {error}). "
            f"Where there is a network, fetch {url}; then load_checkpoint(model, path)",
            url,
        ) from error


def _hub() -> Any:
    """Return the module huggingface_hub; raise ImportError with what to do."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "huggingface_hub is not installed: pip install 'videomamba-bench[hub]', or download the file yourself and pass it "
            "to load_checkpoint"
        ) from error
    return huggingface_hub
