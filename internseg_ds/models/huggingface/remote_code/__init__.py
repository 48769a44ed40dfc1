"""Code that folders bring: files that need torch and transformers alone, and import nothing of this package."""
