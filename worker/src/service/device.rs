//! The store's device memory as this worker reaches it: blocks for kernels where they lie.

use std::any::Any;
use std::sync::Arc;

use terrace_client::{DeviceBlock, DeviceWriteBlock};
use terrace_core::ByteCount;
use terrace_gpudirect::kernels::{KernelBytes, KernelQueue};
use terrace_gpudirect::{Cuda, Device, DeviceBytes, HostOnly};

use crate::model::{ComputeDevice, Engine};

/// The device that computes, as memory of the store.
pub(crate) struct StoreDevice {
    /// Maps its chunks.
    pub(crate) memory: Arc<dyn Device>,
    queue: Arc<dyn KernelQueue>,
}

impl StoreDevice {
    /// The device that computes; `None` if the processor does.
    ///
    /// # Errors
    /// What the device says.
    pub(crate) fn open(device: ComputeDevice, engine: &Engine) -> anyhow::Result<Option<Arc<Self>>> {
        let Engine::Device(model) = engine else { return Ok(None) };
        let queue = Arc::clone(model.queue());
        let memory: Arc<dyn Device> = match device {
            ComputeDevice::Cpu => return Ok(None),
            ComputeDevice::Cuda(ordinal) => Arc::new(Cuda::open(ordinal)?),
            // It has no room of its own: what it maps is the daemon's.
            ComputeDevice::HostOnly => Arc::new(HostOnly::new(0, ByteCount::new(0))?),
        };
        Ok(Some(Arc::new(Self { memory, queue })))
    }

    /// A sealed block where it lies. The guard lives as long as the answer.
    pub(crate) fn read(&self, block: &DeviceBlock) -> Option<KernelBytes> {
        self.lent(block.bytes(), Arc::new(block.clone()))
    }

    /// A frame to fill where it lies. `owner` holds the lease that `block` belongs to.
    pub(crate) fn write(
        &self,
        block: &DeviceWriteBlock,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Option<KernelBytes> {
        self.lent(block.bytes(), owner)
    }

    fn lent(&self, bytes: &DeviceBytes, owner: Arc<dyn Any + Send + Sync>) -> Option<KernelBytes> {
        let lent = KernelBytes::lent(self.queue.as_ref(), bytes, owner);
        lent.inspect_err(|error| tracing::warn!(%error, "a block on the device cannot be used there")).ok()
    }
}
