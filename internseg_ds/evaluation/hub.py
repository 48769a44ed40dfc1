"""A folder uploaded to the Hugging Face hub, or to whatever HF_ENDPOINT names."""

from pathlib import Path

from internseg_ds.errors import ConfigError, OutputError, reason_of


def check_repository(repo: str) -> None:
    """Raises ConfigError where huggingface_hub is missing, or `repo` cannot be the name of a repository: before
    anything is written."""
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
    except ImportError as error:
        raise ConfigError(
            "--push-to-hub needs huggingface_hub: pip install 'internseg_ds[transformers]'"
        ) from error
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo}: {reason_of(error)}; write OWNER/NAME") from error


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload a folder to the model repository `repo` ("owner/name"), which is made, private, where there is none;
    returns the address of the commit.

    Raises ConfigError as `check_repository` does; OutputError where the hub refuses or cannot be reached: the folder
    is whole on this disk all the same.
    """
    check_repository(repo)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message=f"Add {folder.name}"
        )
    except Exception as error:  # whatever the HTTP client of the hub's library raises
        raise OutputError(
            f"{folder} is written, but cannot be uploaded to {repo}: {reason_of(error)}; log in with `hf auth login`, "
            f"or upload it with `hf upload {repo} {folder}`"
        ) from error
    return commit.commit_url
