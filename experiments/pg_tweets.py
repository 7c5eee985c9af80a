"""Happy tweets: pretraining, fine-tuning and policy gradient. Finished stages of the workdir are skipped.

python experiments/pg_tweets.py --config=configs/pg_tweets.py --workdir=runs/tweets
"""

from launch import launch

if __name__ == "__main__":
    launch(task="write")
