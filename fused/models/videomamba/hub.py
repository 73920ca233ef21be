"""Models by name: published weights, folders and repositories with config.json and model.safetensors side by side.

The two files have the format of huggingface_hub's `PyTorchModelHubMixin` for a class whose argument `config` is a dataclass,
and each side reads the other's files. The mixin is not a base class here, so that `import fused` needs no huggingface_hub.
"""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from fused.io.atomic_write import atomic_write
from fused.io.checkpoint_file import CheckpointError, save_checkpoint
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.load import load_checkpoint
from fused.models.videomamba.published import PRETRAINED

T = TypeVar("T", bound="Pretrained")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Pretrained:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a model that is built from a `VideoMambaConfig`."""

    config: VideoMambaConfig

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

        `source` is a name in `fused.PRETRAINED`, a folder that `save_pretrained` wrote, or a repository of such files on the
        Hugging Face hub. `overrides` are fields of the configuration that differ from the trained model's, such as
        num_classes, num_frames or img_size; weights are converted as by `load_checkpoint`, which takes `which`, `strict` and
        `inflate` and logs what it did. `revision`, `cache_dir`, `token` and `local_files_only` are huggingface_hub's.

        Raises ValueError for a wrong configuration, TypeError for a field that it does not have, ImportError without
        huggingface_hub (safetensors), CheckpointError for weights that do not fit, FileNotFoundError for a folder without the
        files, ConnectionError if a file can neither be downloaded nor is in the cache.

            >>> model = VideoMamba.from_pretrained("videomamba_t16_k400_f16_res224", num_classes=10)
        """
        remote = {
            "revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only
        }  # fmt: skip
        if str(source) in PRETRAINED:
            published = PRETRAINED[str(source)]
            trained, weights = published.config, _download(published.repository, published.file, remote)
        elif Path(source).is_dir():
            trained, weights = _read_config(Path(source) / CONFIG), Path(source) / WEIGHTS
        elif isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/")):
            trained = _read_config(_download(source, CONFIG, remote))
            weights = _download(source, WEIGHTS, remote)
        else:
            near = [name for name in PRETRAINED if str(source) in name]
            raise ValueError(
                f"{str(source)!r} is no folder, no repository (owner/name) and no published model; "
                + (f"published are {', '.join(near[:8])}" if near else "the published ones are the keys of fused.PRETRAINED")
            )
        model: Any = cls(replace(trained, **overrides), backend=backend)  # type: ignore[call-arg]
        load_checkpoint(model, weights, which=which, strict=strict, inflate=inflate, grid=trained.grid)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors, each atomically, and return the folder.

        Raises ImportError without safetensors, OSError if the disk is full; the old files stay then.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / CONFIG) as draft:
            draft.write_text(json.dumps(asdict(replace(self.config, pretrained=None)), indent=2) + "\n")
            save_checkpoint(self, folder / WEIGHTS)  # type: ignore[arg-type]
        return folder

    def push_to_hub(
        self, repository: str, *, token: str | bool | None = None, private: bool | None = None, message: str = "Weights"
    ) -> str:
        """Upload the files of `save_pretrained` to a repository, which is made if missing, and return the commit's URL."""
        api = _hub().HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))


def _read_config(path: Path) -> VideoMambaConfig:
    """Return the configuration in a file. Raises CheckpointError for unknown fields too: the model would be another one."""
    try:
        fields = json.loads(path.read_text())
        if isinstance(fields.get("img_size"), list):  # JSON has no tuples
            fields["img_size"] = tuple(fields["img_size"])
        return VideoMambaConfig(**fields)
    except FileNotFoundError as error:
        raise FileNotFoundError(2, "the folder holds no configuration", str(path)) from error
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no configuration of a VideoMamba: {error}") from error


def _download(repository: str, file: str, remote: dict[str, Any]) -> Path:
    """Return a file's path in huggingface_hub's cache, downloaded if missing. Raises ConnectionError if that fails."""
    hub = _hub()
    try:
        return Path(hub.hf_hub_download(repository, file, **remote))
    except Exception as error:  # the causes have no common class: offline, no such repository, no such file, proxies
        raise ConnectionError(
            f"{file} of {repository} could not be downloaded and is not in the cache ({type(error).__name__}: {error}). "
            f"Where there is a network, fetch https://huggingface.co/{repository}/resolve/main/{file}; "
            "then load_checkpoint(model, path)"
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
