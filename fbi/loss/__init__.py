"""Losses: any weighted sum of terms over logits and over features of student and teacher.

A loss is text: `ce`, `ad`, `ad:temperature=2,top_k=64`, `kl + 10*hidden`, `0.5*ce + 0.5*ad`; `mix` is the last one.
"""

from fbi.loss.chunked import Readout as Readout
from fbi.loss.chunked import check_chunks as check_chunks
from fbi.loss.chunked import chunked as chunked
from fbi.loss.features import direction_matching as direction_matching
from fbi.loss.features import hidden_states as hidden_states
from fbi.loss.features import matched_layers as matched_layers
from fbi.loss.features import similarity as similarity
from fbi.loss.kinds import KINDS as KINDS
from fbi.loss.kinds import Kind as Kind
from fbi.loss.kinds import Option as Option
from fbi.loss.lesson import Lesson as Lesson
from fbi.loss.lesson import completed as completed
from fbi.loss.lesson import from_rows as from_rows
from fbi.loss.lesson import known as known
from fbi.loss.lesson import read_out as read_out
from fbi.loss.logits import confidence_aware_kl as confidence_aware_kl
from fbi.loss.logits import distillation as distillation
from fbi.loss.logits import forward_kl as forward_kl
from fbi.loss.logits import log_normalizer as log_normalizer
from fbi.loss.logits import next_token as next_token
from fbi.loss.logits import reverse_kl as reverse_kl
from fbi.loss.logits import teacher_entropy as teacher_entropy
from fbi.loss.outputs import NO_WATCH as NO_WATCH
from fbi.loss.outputs import Outputs as Outputs
from fbi.loss.outputs import Watch as Watch
from fbi.loss.routing import SCORES as SCORES
from fbi.loss.routing import efficiency as efficiency
from fbi.loss.routing import prediction as prediction
from fbi.loss.routing import separability as separability
from fbi.loss.weighted import ALIASES as ALIASES
from fbi.loss.weighted import Loss as Loss
from fbi.loss.weighted import Term as Term
