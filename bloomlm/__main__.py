"""`python -m bloomlm` is the `bloomlm` command."""

from bloomlm.cli.main import main

main()
