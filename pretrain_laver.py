"""Train a vision-language model with latent visual reconstruction: `torchrun pretrain_laver.py --config RECIPE`.

The same program serves a laptop (one process, CPU), one GPU and a cluster. `--help` lists every flag.
"""

from laver_mcore.cli.main import script

if __name__ == "__main__":  # Megatron's checkpoint writer spawns a process that imports this file again
    script("train")
