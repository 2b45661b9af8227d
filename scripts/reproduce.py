"""Run recipes over seeds and make the table of results: `flax-resnet reproduce` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("reproduce")
