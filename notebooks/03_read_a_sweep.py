# %% [markdown]
# # Reading a sweep
# Run directories into a table of data, the tables and verdicts of an experiment, pictures, and a scaling law. Nothing
# here loads JAX: it reads files, of this machine's runs or of the results that come with the repository.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display

from fbi.report.measure import interval, judged, measure
from fbi.report.sweep import overview, read, tables
from fbi.report.sweep_plot import draw, figures

place = next(path for path in (Path("docs/results"), Path("../docs/results")) if path.exists())
results = read(place)
print({found.sweep.name: len(found.found) for found in results})

# %% [markdown]
# ## Runs as a DataFrame
# A measure is a name: `loss`, `summary.FIELD`, `config.FIELD`, or the mean of a field of `metrics.jsonl`.

# %%
MEASURES = ("loss", "bits_per_byte", "summary.stored_bits_per_weight", "config.model.layers", "train.grad_norm")
rows = [
    {"sweep": found.sweep.name, "configuration": run.group, "seed": run.seed}
    | {name: measure(run.record, name) for name in MEASURES}
    for found in results
    for run in found.found
]
frame = pd.DataFrame(rows, columns=["sweep", "configuration", "seed", *MEASURES])
display(frame.groupby(["sweep", "configuration"])["loss"].agg(["mean", "std", "count"]).round(4))

# %% [markdown]
# ## The experiment's own tables
# Each is data in `NAME.sweep.json`: which runs make a row, what was published, what is claimed.

# %%
for found in results:
    print((tables(found) or [overview(found)])[0].terminal())

# %% [markdown]
# ## Verdicts
# A claim compares two configurations seed by seed: the interval is Student's, and three seeds are the least.

# %%
for found in results:
    for claim in found.sweep.claims:
        differences, verdict = judged(claim, found.found)
        bounds = interval(differences)
        print(f"{verdict:15s} {claim.text}" + (f"  [{bounds[0]:+.3f}, {bounds[1]:+.3f}]" if bounds else ""))

# %% [markdown]
# ## Pictures

# %%
for found in results:
    for figure in figures(found)[:1]:
        try:
            display(draw(figure, found.found))
        except ValueError as error:  # nothing finished yet
            print(error)

# %% [markdown]
# ## A scaling law
# The law of QuEST (arXiv 2502.05003) on its authors' 104 runs: `eff` is the share of its parameters that a low-bit
# model is worth.

# %%
sys.path.insert(0, str(place.parents[1]))
from experiments.quest_law import observations
from fbi.analysis.scaling import fit

law = fit(observations(), reference="BF16")
display(pd.Series(law.eff, name="eff").sort_values())

# %%
names = sorted(law.eff, key=lambda name: law.eff[name])
plt.figure(figsize=(7, 3), layout="constrained")
plt.bar(names, [law.eff[name] for name in names])
plt.ylabel("eff(P)")
plt.title(f"RMSE of log residuals {law.rmse:.4f}; 'jax' loaded: {'jax' in sys.modules}")
plt.xticks(rotation=60)
plt.show()
