"""Write a data set as ArrayRecord shards: `flax-resnet shards` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("shards")
