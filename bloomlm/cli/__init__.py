"""The `bloomlm` command: one file per verb, imported when the verb is used."""
