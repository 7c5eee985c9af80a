"""Tiny stories: pretraining, fine-tuning and policy gradient. Finished stages of the workdir are skipped.

python experiments/pg_stories.py --config=configs/pg_stories.py --workdir=runs/stories
"""

from launch import launch

if __name__ == "__main__":
    launch(task="write")
