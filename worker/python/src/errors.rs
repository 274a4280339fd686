//! Errors of the client as exceptions of `terrace_kv`.

use pyo3::prelude::*;
use pyo3::{PyErr, import_exception};

use terrace_client::{BadBlock, ClientError, Stale};
use terrace_gpudirect::DeviceError;

import_exception!(terrace_kv._errors, BufferInUse);
import_exception!(terrace_kv._errors, ClosedError);
import_exception!(terrace_kv._errors, ConnectError);
import_exception!(terrace_kv._errors, CorruptBlock);
import_exception!(terrace_kv._errors, DeviceFailed);
import_exception!(terrace_kv._errors, ForkedError);
import_exception!(terrace_kv._errors, InvalidArgument);
import_exception!(terrace_kv._errors, NoAnswer);
import_exception!(terrace_kv._errors, ProtocolError);
import_exception!(terrace_kv._errors, Refused);
import_exception!(terrace_kv._errors, SessionEnded);
import_exception!(terrace_kv._errors, StaleBlock);
import_exception!(terrace_kv._errors, Throttled);
import_exception!(terrace_kv._errors, Unsupported);

/// Looks for the exceptions now: when the interpreter ends, nothing can be imported any more, and a destructor of the
/// program that calls us then must get an exception.
pub(crate) fn load(py: Python<'_>) -> PyResult<()> {
    py.import("terrace_kv._errors")?;
    py.get_type::<BufferInUse>();
    py.get_type::<ClosedError>();
    py.get_type::<ConnectError>();
    py.get_type::<CorruptBlock>();
    py.get_type::<DeviceFailed>();
    py.get_type::<ForkedError>();
    py.get_type::<InvalidArgument>();
    py.get_type::<NoAnswer>();
    py.get_type::<ProtocolError>();
    py.get_type::<Refused>();
    py.get_type::<SessionEnded>();
    py.get_type::<StaleBlock>();
    py.get_type::<Throttled>();
    py.get_type::<Unsupported>();
    Ok(())
}

/// Why a call failed, before the interpreter is needed to say so.
#[derive(Debug)]
pub(crate) enum Failure {
    Client(ClientError),
    /// The named object was closed before the call, or while it ran.
    Closed(&'static str),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Client(error) => from_client(&error),
            Failure::Closed(what) => closed(what),
        }
    }
}

fn from_client(error: &ClientError) -> PyErr {
    let text = error.to_string();
    match error {
        ClientError::NoTarget
        | ClientError::BadAddress { .. }
        | ClientError::Unreachable { .. }
        | ClientError::NoRandom { .. } => ConnectError::new_err(text),
        ClientError::Disconnected => SessionEnded::new_err(text),
        ClientError::NoAnswer { .. } => NoAnswer::new_err(text),
        ClientError::Refused { code, .. } => Refused::new_err((text, format!("{code:?}"))),
        ClientError::Throttled { .. } => Throttled::new_err(text),
        ClientError::NeedsLane { .. } | ClientError::NeedsGrpc { .. } => Unsupported::new_err(text),
        ClientError::ForeignSpace
        | ClientError::EmptyBundle
        | ClientError::BadKey { .. }
        | ClientError::TooManyBlocks { .. }
        | ClientError::Unpaired { .. }
        | ClientError::WrongLength { .. }
        | ClientError::NotWritable { .. }
        | ClientError::UnknownDevice { .. }
        | ClientError::OtherDevice { .. }
        | ClientError::Lane(_) => InvalidArgument::new_err(text),
        ClientError::Device(error) => device(error.clone()),
        ClientError::Block(error) => bad_block(*error),
        ClientError::Map(_) | ClientError::Protocol { .. } => ProtocolError::new_err(text),
    }
}

/// An argument that cannot be meant.
pub(crate) fn invalid(text: impl Into<String>) -> PyErr {
    InvalidArgument::new_err(text.into())
}

/// `what` was closed.
pub(crate) fn closed(what: &'static str) -> PyErr {
    ClosedError::new_err(format!("this {what} was closed"))
}

/// Views forbid what was asked.
pub(crate) fn in_use(text: impl Into<String>) -> PyErr {
    BufferInUse::new_err(text.into())
}

/// A fence moved.
pub(crate) fn stale() -> PyErr {
    StaleBlock::new_err(Stale.to_string())
}

/// A copy that is not the block.
pub(crate) fn bad_block(error: BadBlock) -> PyErr {
    match error {
        BadBlock::Stale(_) => stale(),
        BadBlock::Checksum { .. } => CorruptBlock::new_err(error.to_string()),
    }
}

/// A device is not there, is full, or failed.
pub(crate) fn device(error: DeviceError) -> PyErr {
    match error {
        DeviceError::OutOfBounds { .. } | DeviceError::BadDescriptor { .. } => invalid(error.to_string()),
        DeviceError::NoDriver { .. }
        | DeviceError::DriverTooOld { .. }
        | DeviceError::NoDevice { .. }
        | DeviceError::Unsupported { .. }
        | DeviceError::NoMemory { .. }
        | DeviceError::BadJob { .. }
        | DeviceError::InUse { .. }
        | DeviceError::Throttled { .. }
        | DeviceError::Late(_)
        | DeviceError::Hung { .. }
        | DeviceError::Lost { .. }
        | DeviceError::Driver { .. } => DeviceFailed::new_err(error.to_string()),
    }
}

/// A child uses its parent's object.
pub(crate) fn forked() -> PyErr {
    ForkedError::new_err("this object belongs to the parent process; connect again in the forked child")
}
