//! How configurations name a device: `cuda:0`, `cuda:GPU-<uuid>`, `host-only`.
//!
//! Promises: a name says which kind of device is meant, and nothing else is
//! opened in its place.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use terrace_core::ByteCount;

use crate::cuda::{Cuda, find};
use crate::device::Device;
use crate::error::DeviceError;
use crate::host_only::HostOnly;

/// The name of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// A CUDA device by the driver's number.
    Cuda(u32),
    /// A CUDA device by its uuid, which stays when others come and go.
    CudaUuid([u8; 16]),
    /// Host memory that stands in for a device, for tests; numbers tell several apart.
    HostOnly(u32),
}

/// A text that names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` names no device; allowed are \"cuda:0\", \"cuda:GPU-<uuid>\" and, for tests, \"host-only\" or \"host-only:1\""
)]
pub struct BadDeviceName {
    /// The text.
    pub text: String,
}

impl FromStr for DeviceName {
    type Err = BadDeviceName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadDeviceName { text: text.to_owned() };
        match text.split_once(':') {
            Some(("cuda", uuid)) if uuid.starts_with("GPU-") => {
                uuid_of(&uuid[4..]).map(Self::CudaUuid).ok_or_else(bad)
            }
            Some(("cuda", number)) => number.parse().map(Self::Cuda).map_err(|_| bad()),
            Some(("host-only", number)) => number.parse().map(Self::HostOnly).map_err(|_| bad()),
            None if text == "host-only" => Ok(Self::HostOnly(0)),
            Some(_) | None => Err(bad()),
        }
    }
}

/// 32 hexadecimal digits with hyphens anywhere, as `nvidia-smi -L` prints them.
fn uuid_of(text: &str) -> Option<[u8; 16]> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .filter(|digit| *digit != '-')
        .map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    let bytes: Vec<u8> =
        digits?.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
    (text.chars().filter(|digit| *digit != '-').count() == 32).then_some(())?;
    bytes.try_into().ok()
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::HostOnly(number) => write!(f, "host-only:{number}"),
            Self::CudaUuid(uuid) => {
                f.write_str("cuda:GPU-")?;
                for (at, byte) in uuid.iter().enumerate() {
                    let hyphen = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
                    write!(f, "{hyphen}{byte:02x}")?;
                }
                Ok(())
            }
        }
    }
}

impl DeviceName {
    /// Opens the device. `bytes` are what the stand-in has in all. Takes a second or more for a device of the driver.
    ///
    /// # Errors
    /// As [`Cuda::open`]; [`DeviceError::Unsupported`] for a uuid that the driver does not find.
    pub fn open(self, bytes: ByteCount) -> Result<Arc<dyn Device>, DeviceError> {
        match self {
            Self::Cuda(ordinal) => Ok(Arc::new(Cuda::open(ordinal)?)),
            Self::CudaUuid(uuid) => Ok(Arc::new(Cuda::open(find(uuid)?)?)),
            Self::HostOnly(number) => Ok(Arc::new(HostOnly::new(number, bytes)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name that is read as another would open another device, or the stand-in in place of one.
    #[test]
    fn names_are_read_as_they_are_written() {
        let uuid = "cuda:GPU-0123abcd-4567-89ef-0123-456789abcdef";
        for text in ["cuda:0", "cuda:17", "host-only:0", "host-only:3", uuid] {
            assert_eq!(text.parse::<DeviceName>().map(|name| name.to_string()), Ok(text.to_owned()));
        }
        assert_eq!("host-only".parse(), Ok(DeviceName::HostOnly(0)));
        let bad = ["", "cuda", "cuda:", "cuda:-1", "cuda:GPU-12", "host", "host-only:", "rocm:0", "0"];
        for text in bad.into_iter().chain(["cuda:GPU-0123abcd-4567-89ef-0123-456789abcdeg"]) {
            assert_eq!(text.parse::<DeviceName>(), Err(BadDeviceName { text: text.to_owned() }), "{text}");
        }
    }
}
