"""The paper's claims at small scale: arms, runs, measurements, verdicts."""
