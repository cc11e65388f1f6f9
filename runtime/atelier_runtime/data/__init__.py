"""Training data: from folders of pictures, clips or sounds to encoded micro-batches.

source    files and captions            scan      content, size, readability      captions  which text
image     pictures to pixels            video     clips to pixels                 sound     sounds to waveforms
cache     encoded samples on disk       encode    building what is missing        keys      names of entries
prepare   choosing the samples          build     all of it, in order             funnel    what was left out and why
buckets   sizes                         order     which samples a step takes      run_order the order of a run's samples
dataset   what a micro-batch is made of loader    micro-batches of a rank
"""

from atelier_runtime.data.build import build_dataset
from atelier_runtime.data.dataset import Dataset, MicroBatch
from atelier_runtime.data.loader import Loader
from atelier_runtime.data.order import SampleOrder, SliderOrder, Slot, StepBatch

__all__ = ["Dataset", "Loader", "MicroBatch", "SampleOrder", "SliderOrder", "Slot", "StepBatch", "build_dataset"]
