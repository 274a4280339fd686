//! What devices this machine has.

use cudarc::driver::CudaContext;
use terrace_core::ByteCount;

/// Whether the Hbm tier can be on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HbmStatus {
    /// It cannot; a sentence says why. Nothing is wrong with a machine like that.
    Off {
        /// For example "no CUDA driver: Hbm tier off".
        reason: String,
    },
    /// These devices answer.
    Present {
        /// By ordinal.
        gpus: Vec<Gpu>,
    },
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its number for the driver.
    pub ordinal: usize,
    /// For example "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// Memory in all.
    pub bytes: ByteCount,
    /// Major and minor number.
    pub compute_capability: (i32, i32),
}

impl std::fmt::Display for HbmStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Off { reason } => f.write_str(reason),
            Self::Present { gpus } => {
                write!(f, "{} CUDA device(s):", gpus.len())?;
                gpus.iter().try_for_each(|gpu| write!(f, " {} ({} bytes)", gpu.name, gpu.bytes.get()))
            }
        }
    }
}

/// Whether the driver's library can be loaded. Every call into cudarc comes after it.
pub(crate) fn driver_present() -> bool {
    // SAFETY: it only tries to open the library; the driver's initialisers may run.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// Asks the driver, if there is one. Takes a second on a machine with devices,
/// microseconds without; call it once and off the runtime's threads.
pub fn probe() -> HbmStatus {
    if !driver_present() {
        return HbmStatus::Off { reason: "no CUDA driver: Hbm tier off".to_owned() };
    }
    match devices() {
        Ok(gpus) if gpus.is_empty() => {
            HbmStatus::Off { reason: "CUDA driver finds no device: Hbm tier off".to_owned() }
        }
        Ok(gpus) => HbmStatus::Present { gpus },
        Err(error) => HbmStatus::Off { reason: format!("CUDA driver: {error}: Hbm tier off") },
    }
}

fn devices() -> Result<Vec<Gpu>, cudarc::driver::DriverError> {
    let count = usize::try_from(CudaContext::device_count()?).unwrap_or(0);
    (0..count)
        .map(|ordinal| {
            let context = CudaContext::new(ordinal)?;
            Ok(Gpu {
                ordinal,
                name: context.name()?,
                bytes: ByteCount::new(context.total_mem()? as u64),
                compute_capability: context.compute_capability()?,
            })
        })
        .collect()
}
