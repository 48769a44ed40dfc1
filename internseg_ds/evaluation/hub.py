"""A folder uploaded to the Hugging Face hub, or to whatever HF_ENDPOINT names."""

from pathlib import Path

from internseg_ds.errors import ConfigError, OutputError, reason_of


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload a folder to the model repository `repo` ("owner/name"), which is made, private, where there is none;
    returns the address of the commit.

    Raises ConfigError where huggingface_hub is missing or the name cannot be one; OutputError where the hub refuses
    or cannot be reached: the folder is whole on this disk all the same.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ConfigError(
            "--push-to-hub needs huggingface_hub: pip install 'internseg_ds[transformers]'"
        ) from error
    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message=f"Add {folder.name}"
        )
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo}: {reason_of(error)}; write OWNER/NAME") from error
    except Exception as error:  # whatever the HTTP client of the hub's library raises
        raise OutputError(
            f"{folder} is written, but cannot be uploaded to {repo}: {reason_of(error)}; log in with `hf auth login`, "
            f"or upload it with `hf upload {repo} {folder}`"
        ) from error
    return commit.commit_url
