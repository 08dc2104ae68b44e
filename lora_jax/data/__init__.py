"""What a run and the notebooks read: tables, chats, packed rows, tokenizers and pinned downloads."""
