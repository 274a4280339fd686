//! Loading the driver, asking it simple questions, and reading its answers.

use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use cudarc::driver::sys::{
    self, CUdevice, CUdevice_attribute, CUdevice_attribute_enum as Attribute, CUresult,
};
use terrace_core::ByteCount;

use crate::error::DeviceError;
use crate::status::Gpu;

/// Memory by descriptors for other processes is older, but nothing older is tested with these bindings.
const VERSION_MIN: u32 = 12_000;
/// The driver wakes devices that nobody used for a while.
const FIND_WITHIN: Duration = Duration::from_secs(60);

/// Every function that this crate calls. The bindings panic where one is missing.
const FUNCTIONS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDeviceTotalMem_v2",
    "cuDeviceGetAttribute",
    "cuDeviceCanAccessPeer",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxReset_v2",
    "cuCtxSetCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventDestroy_v2",
    "cuMemGetInfo_v2",
    "cuMemGetAllocationGranularity",
    "cuMemCreate",
    "cuMemRelease",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemSetAccess",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemsetD8Async",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyAsync",
];

/// Loads and initialises the driver, once, and answers its version.
pub(crate) fn load() -> Result<u32, DeviceError> {
    static LOADED: OnceLock<Result<u32, DeviceError>> = OnceLock::new();
    LOADED.get_or_init(load_now).clone()
}

fn load_now() -> Result<u32, DeviceError> {
    // SAFETY: it only tries to open the library; the driver's initialisers may run.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver { detail: "libcuda.so is not there".to_owned() });
    }
    if let Some(missing) = FUNCTIONS.iter().find(|name| !has(name)) {
        return Err(DeviceError::DriverTooOld { found: format!("no {missing}"), needed: wanted() });
    }
    let mut version = 0;
    // SAFETY: it may be called before anything else, and writes one number.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    let version = u32::try_from(version).unwrap_or(0);
    if version < VERSION_MIN {
        let found = format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
        return Err(DeviceError::DriverTooOld { found, needed: wanted() });
    }
    // SAFETY: the library and the function are there.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => Ok(version),
        result @ (CUresult::CUDA_ERROR_STUB_LIBRARY
        | CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
        | CUresult::CUDA_ERROR_OPERATING_SYSTEM) => {
            Err(DeviceError::NoDriver { detail: format!("cuInit says {}", named(result)) })
        }
        CUresult::CUDA_ERROR_NO_DEVICE => Err(DeviceError::NoDevice { ordinal: 0, count: 0 }),
        result => check("cuInit", result).map(|()| version),
    }
}

/// The oldest driver that will do, for errors.
pub(crate) fn wanted() -> String {
    format!("CUDA {}.{}", VERSION_MIN / 1000, VERSION_MIN % 1000 / 10)
}

/// Whether the driver has a function, once it is known to be there.
pub(crate) fn has(name: &str) -> bool {
    // SAFETY: the library is there; the symbol is looked up and not called.
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()).is_ok() }
}

/// Calls something that may hang, on a thread of its own. A thread that hangs is left behind.
pub(crate) fn within<T: Send + 'static>(
    call: &'static str,
    time: Duration,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DeviceError> {
    let (answer, answered) = mpsc::channel();
    std::thread::Builder::new()
        .name("cuda-call".to_owned())
        // Nobody may be waiting any more.
        .spawn(move || drop(answer.send(run())))
        .map_err(|error| DeviceError::Driver { call: "thread", detail: error.to_string() })?;
    answered.recv_timeout(time).map_err(|_| DeviceError::Hung { call, within: time })
}

fn named(result: CUresult) -> String {
    format!("{result:?}")
}

/// What a result means to a caller.
pub(crate) fn check(call: &'static str, result: CUresult) -> Result<(), DeviceError> {
    let lost = || Err(DeviceError::Lost { detail: format!("{call} says {}", named(result)) });
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        // After these, every call of the context fails.
        CUresult::CUDA_ERROR_DEINITIALIZED
        | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
        | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
        | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
        | CUresult::CUDA_ERROR_CONTAINED
        | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
        | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
        | CUresult::CUDA_ERROR_ASSERT
        | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUresult::CUDA_ERROR_INVALID_PC
        | CUresult::CUDA_ERROR_LAUNCH_FAILED
        | CUresult::CUDA_ERROR_EXTERNAL_DEVICE
        | CUresult::CUDA_ERROR_MPS_CLIENT_TERMINATED
        | CUresult::CUDA_ERROR_UNKNOWN => lost(),
        other => Err(DeviceError::Driver { call, detail: named(other) }),
    }
}

/// The same error, if it says that memory is short, with how much was wanted.
pub(super) fn sized(error: DeviceError, bytes: ByteCount) -> DeviceError {
    match error {
        DeviceError::Driver { detail, .. } if detail == named(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
            DeviceError::NoMemory { bytes: bytes.get() }
        }
        other => other,
    }
}

/// The same error, as the loss of the device.
pub(super) fn lost(error: DeviceError) -> DeviceError {
    if error.is_lost() { error } else { DeviceError::Lost { detail: error.to_string() } }
}

/// Devices that the driver has.
pub(crate) fn count() -> Result<u32, DeviceError> {
    let mut count = 0;
    // SAFETY: the driver is initialised and writes one number.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

pub(super) fn attribute(device: CUdevice, attribute: CUdevice_attribute) -> Result<i32, DeviceError> {
    let mut value = 0;
    // SAFETY: the driver is initialised and writes one number.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) })?;
    Ok(value)
}

pub(super) fn compute_capability(device: CUdevice) -> Result<(u32, u32), DeviceError> {
    let number = |of| attribute(device, of).map(|number| u32::try_from(number).unwrap_or(0));
    Ok((
        number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

pub(super) fn name(device: CUdevice) -> Result<String, DeviceError> {
    let mut text = [0_u8; 256];
    // SAFETY: the driver writes at most so many bytes, the last a zero.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(text.as_mut_ptr().cast(), 256, device) })?;
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

pub(super) fn uuid(device: CUdevice) -> Result<[u8; 16], DeviceError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the driver writes one such struct.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) })?;
    Ok(uuid.bytes.map(i8::cast_unsigned))
}

pub(super) fn memory(device: CUdevice) -> Result<ByteCount, DeviceError> {
    let mut bytes = 0;
    // SAFETY: the driver writes one number.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut bytes, device) })?;
    Ok(ByteCount::new(bytes as u64))
}

/// Other devices that can reach this one's memory.
pub(super) fn peers(device: CUdevice, count: u32) -> Vec<CUdevice> {
    let reaches = |peer: CUdevice| {
        let mut can = 0;
        // SAFETY: both devices exist, and the driver writes one number.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, peer, device) };
        asked == CUresult::CUDA_SUCCESS && can != 0
    };
    (0..i32::try_from(count).unwrap_or(0)).filter(|peer| *peer != device && reaches(*peer)).collect()
}

/// The ordinal of the device with this uuid.
pub(crate) fn find(wanted: [u8; 16]) -> Result<u32, DeviceError> {
    within("looking for a device", FIND_WITHIN, move || {
        load()?;
        for ordinal in 0..count()? {
            let mut device = 0;
            let named = i32::try_from(ordinal).unwrap_or(i32::MAX);
            // SAFETY: the driver is initialised and writes one number.
            check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, named) })?;
            if uuid(device)? == wanted {
                return Ok(ordinal);
            }
        }
        Err(DeviceError::Unsupported { what: "the driver finds no device with this uuid".to_owned() })
    })?
}

/// What can be said of a device without opening it.
pub(crate) fn gpu(ordinal: u32) -> Result<Gpu, DeviceError> {
    let mut device = 0;
    let named = i32::try_from(ordinal).unwrap_or(i32::MAX);
    // SAFETY: the driver is initialised and writes one number.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, named) })?;
    Ok(Gpu {
        ordinal,
        name: name(device)?,
        bytes: memory(device)?,
        compute_capability: compute_capability(device)?,
    })
}
