//! Where cuFile writes its log, which only the environment can say.

use std::path::Path;

use crate::error::DeviceError;

pub(super) const LOG: &str = "CUFILE_LOGFILE_PATH";

/// Sets where the library writes its log, unless the environment says so already.
/// Must be called at the very start of a program.
///
/// # Errors
/// [`DeviceError::Unsupported`] when other threads run, which may be reading the environment.
pub fn log_to(folder: &Path) -> Result<(), DeviceError> {
    if std::env::var_os(LOG).is_some() {
        return Ok(());
    }
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    if !matches!(threads, Ok(1)) {
        let what = format!("setting {LOG} while other threads run; set it where the program is started");
        return Err(DeviceError::Unsupported { what });
    }
    // SAFETY: this is the only thread of the process, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var(LOG, folder.join("cufile.log")) };
    Ok(())
}
