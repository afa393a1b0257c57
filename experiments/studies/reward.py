"""The learned preference score against rates weighted by hand: OneRec Technical Report (arXiv
2506.13695), section 4.3.

The hand-weighted sums are of the same model's predicted rates: once all alike, once in proportion
to how rare a kind of feedback is.

    python -m experiments.studies.reward --small
"""

from experiments.studies.posttraining import START, Study, command

ALIKE = "ctr=1,lvtr=1,vtr=1,ltr=1,wtr=1,cmtr=1"
RARE = "ctr=1,lvtr=2,vtr=1,ltr=15,wtr=120,cmtr=80"

STUDY = Study(
    name="reward",
    question="P-Score against a reward weighted by hand",
    paper=(
        "the P-Score as reward, over none: Kuaishou +0.21% Watch Time, +0.26% App Stay Time and "
        "+0.17% Video View; Lite +0.71%, +0.22% and +0.35%. vtr alone costs 10% to 15% of Video "
        "Views."
    ),
    arms=lambda config, starts: {
        "by hand, alike": {"objective": ALIKE},
        "P-Score": {},
        "by hand, rare heavier": {"objective": RARE},
        "vtr alone": {"objective": "vtr"},
        START: None,
    },
    headline=("watch_s", "long_view", "satisfaction"),
)

if __name__ == "__main__":
    command(STUDY)
