//! What devices this machine has.

use std::time::Duration;

use terrace_core::ByteCount;

use crate::cuda::{count, gpu, load, within};
use crate::error::DeviceError;

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
    pub ordinal: u32,
    /// For example "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// Memory in all.
    pub bytes: ByteCount,
    /// Major and minor number.
    pub compute_capability: (u32, u32),
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

/// Drivers that hang do so for good.
const PROBE_WITHIN: Duration = Duration::from_secs(60);

/// Asks the driver, if there is one. Takes a second on a machine with devices,
/// microseconds without; call it once and off the runtime's threads.
pub fn probe() -> HbmStatus {
    let off = |reason: String| HbmStatus::Off { reason: format!("{reason}: Hbm tier off") };
    let asked = within("asking for devices", PROBE_WITHIN, || {
        load()?;
        (0..count()?).map(gpu).collect::<Result<Vec<_>, _>>()
    });
    match asked.and_then(|gpus| gpus) {
        Ok(gpus) if gpus.is_empty() => off("CUDA driver finds no device".to_owned()),
        Ok(gpus) => HbmStatus::Present { gpus },
        Err(DeviceError::NoDriver { detail }) => off(format!("no CUDA driver ({detail})")),
        Err(error) => off(error.to_string()),
    }
}
