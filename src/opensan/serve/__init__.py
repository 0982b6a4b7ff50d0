"""The HTTP service: an image is encoded once, and labelled with any words by its encoding's id.

limits       what clients may ask, and the gate that holds them to it
photographs  decodes clients' images, at a bounded cost
cache        the encodings that are kept
models       the models, loaded when they are needed
engine       the model's work, batched and off the event loop
answers      segmentations as JSON, PNG, or what a page draws
schemas      what clients send and get
label_studio answers Label Studio, whose tasks' images `task_images` reads
app          the routes
server       uvicorn, patient with work and impatient with clients that stall
"""

from opensan.serve.app import Application, create_app
from opensan.serve.limits import ServiceLimits

__all__ = ["Application", "ServiceLimits", "create_app"]
