"""Kills at random moments."""

import random
import signal

from tests.campaign.judge import Tally, Trial

# SIGKILL as a full memory does it, SIGTERM as a supervisor does, SIGINT as a user does.
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def kill(trial: Trial, tally: Tally, chance: random.Random) -> None:
    """Run the trial's command, kill it on the way, and look at what is left."""
    number = chance.choice(_SIGNALS)
    after = chance.uniform(0, trial.truth.seconds)
    trial.at.clear(cache=chance.random() < 0.5)
    running = trial.start()
    if not running.wait(after):
        running.signal(number)
    disturbance = f"{number.name} after {after:.3f} s"
    trial.check_disturbed(tally, disturbance, running.ended(), honest=False)
    trial.check_again(tally, disturbance)
