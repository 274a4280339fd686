//! `[[hbm]]`: the devices whose memory is the first tier.

use terrace_core::{ByteCount, GPUS_MAX};
use terrace_gpudirect::DeviceName;

use super::file::HbmFile;
use super::{ConfigError, bad, length, size};

/// One device of the Hbm tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HbmDevice {
    /// Which one.
    pub name: DeviceName,
    /// Most memory of it that the daemon takes; whole chunks.
    pub bytes: ByteCount,
    /// What engines beside it cannot make the daemon give back.
    pub bytes_min: ByteCount,
    /// Whether blocks are read from files straight into it.
    pub gds: UseGds,
}

/// Reads by cuFile (GPUDirect Storage).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UseGds {
    /// For the sizes at which a self-test found them quicker than the way through host memory.
    #[default]
    Auto,
    /// Wherever cuFile can be had.
    On,
    /// Never.
    Off,
}

fn gds(text: &str) -> Result<UseGds, ConfigError> {
    match text {
        "auto" => Ok(UseGds::Auto),
        "on" => Ok(UseGds::On),
        "off" => Ok(UseGds::Off),
        other => Err(bad("hbm.gds", format!("`{other}`; allowed are auto, on and off"))),
    }
}

pub(super) fn devices(
    listed: Vec<HbmFile>,
    chunk_bytes: ByteCount,
    notes: &mut Vec<String>,
) -> Result<Vec<HbmDevice>, ConfigError> {
    if listed.len() > usize::from(GPUS_MAX) {
        return Err(bad("hbm", format!("{} devices; the limit is {GPUS_MAX}", listed.len())));
    }
    let mut devices: Vec<HbmDevice> = Vec::with_capacity(listed.len());
    for device in listed {
        let name: DeviceName =
            device.device.parse().map_err(|error| bad("hbm.device", format!("{error}")))?;
        if devices.iter().any(|other| other.name == name) {
            return Err(bad("hbm.device", format!("{name} is listed twice")));
        }
        let bytes = whole_chunks("hbm.bytes", &device.bytes, chunk_bytes)?;
        let bytes_min = length("hbm.bytes_min", device.bytes_min.as_deref().unwrap_or("0"))?;
        if bytes < chunk_bytes {
            return Err(bad(
                "hbm.bytes",
                format!(
                    "{} holds no chunk of {}; raise it, or lower `chunk_bytes`",
                    device.bytes,
                    size::show(chunk_bytes)
                ),
            ));
        }
        if bytes_min > bytes {
            return Err(bad("hbm.bytes_min", format!("is more than hbm.bytes of {name}")));
        }
        if matches!(name, DeviceName::HostOnly(_)) {
            notes.push(format!(
                "{name} is host memory that stands in for a device: for tests, never faster than Pinned"
            ));
        }
        let gds = gds(device.gds.as_deref().unwrap_or("auto"))?;
        devices.push(HbmDevice { name, bytes, bytes_min, gds });
    }
    Ok(devices)
}

fn whole_chunks(key: &str, text: &str, chunk_bytes: ByteCount) -> Result<ByteCount, ConfigError> {
    let bytes = length(key, text)?.get();
    Ok(ByteCount::new(bytes - bytes % chunk_bytes.get()))
}
