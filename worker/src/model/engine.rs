//! What computes: the processor, or a device.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use terrace_gpudirect::DeviceError;
use terrace_gpudirect::kernels::{Cuda, KernelError, KernelQueue, OnHost};

use super::{ARITHMETIC, DEVICE_ARITHMETIC, DeviceModel, ForwardError, Model, Outcome, Scratch, Step};

/// Where to compute, as `--device` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ComputeDevice {
    /// The processor.
    Cpu,
    /// A CUDA device, by its ordinal.
    Cuda(u32),
    /// The kernels of devices on the processor, over host memory in a device's place: for tests, and slow.
    HostOnly,
}

impl ComputeDevice {
    /// Runs kernels there, beside whatever else does.
    ///
    /// # Errors
    /// What the device says, or that there is none.
    pub(crate) fn queue(self) -> Result<Arc<dyn KernelQueue>, KernelError> {
        match self {
            Self::Cpu => {
                Err(DeviceError::Unsupported { what: "kernels, on the processor".to_owned() }.into())
            }
            Self::Cuda(ordinal) => Ok(Arc::new(Cuda::open(ordinal)?)),
            Self::HostOnly => Ok(Arc::new(OnHost::build()?)),
        }
    }
}

impl std::fmt::Display for ComputeDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::HostOnly => f.write_str("host-only"),
        }
    }
}

impl FromStr for ComputeDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => return Ok(Self::Cpu),
            "host-only" => return Ok(Self::HostOnly),
            _ => {}
        }
        let ordinal = text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        ordinal.map(Self::Cuda).ok_or_else(|| format!("{text} is no device; say cpu, or cuda:0"))
    }
}

/// A model where it computes.
#[derive(Clone)]
pub enum Engine {
    /// On the processor.
    Cpu(Arc<Model>),
    /// On a device.
    Device(Arc<DeviceModel>),
}

impl Engine {
    /// Puts a model where it shall compute. A device that is not there is an error, never a reason to
    /// compute elsewhere.
    ///
    /// # Errors
    /// What the device says, or that there is none.
    pub fn new(model: Arc<Model>, device: ComputeDevice) -> Result<Self, ForwardError> {
        match device {
            ComputeDevice::Cpu => Ok(Self::Cpu(model)),
            ComputeDevice::Cuda(_) | ComputeDevice::HostOnly => {
                Ok(Self::Device(Arc::new(DeviceModel::new(model, device.queue()?)?)))
            }
        }
    }

    /// The model, for its sizes and its name.
    pub fn model(&self) -> &Model {
        match self {
            Self::Cpu(model) => model,
            Self::Device(device) => device.host(),
        }
    }

    /// What computes, for logs.
    pub fn describe(&self) -> String {
        match self {
            Self::Cpu(model) => format!("{} with {} threads", model.isa().name(), model.threads()),
            Self::Device(device) => device.describe(),
        }
    }

    /// Which arithmetic the blocks come from, for a space's manifest.
    pub fn arithmetic(&self) -> &'static str {
        match self {
            Self::Cpu(_) => ARITHMETIC,
            Self::Device(device) if device.agrees() => ARITHMETIC,
            Self::Device(_) => DEVICE_ARITHMETIC,
        }
    }

    /// Runs tokens of several sequences in one pass; see [`Model::forward_batch`].
    ///
    /// # Errors
    /// As [`Model::forward_batch`] and [`DeviceModel::forward_batch`].
    pub fn forward_batch(
        &self,
        scratch: &mut Scratch,
        steps: &mut [Step<'_>],
        cancel: &AtomicBool,
    ) -> Result<Outcome, ForwardError> {
        match self {
            Self::Cpu(model) => model.forward_batch(scratch, steps, cancel),
            Self::Device(device) => device.forward_batch(scratch, steps, cancel),
        }
    }
}
