"""Fine-tunes alone, in WORKDIR/sft.

python experiments/sft_summarize.py --config=configs/ppo_summarize.py --workdir=runs/demo
"""

from launch import launch

if __name__ == "__main__":
    launch(task="summarize", only="sft")
