//! Which devices the node had, as the catalog tells before it is opened for writing. Asked only when a device is not
//! there, so that a start with all devices pays nothing.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use terrace_core::DeviceId;

use crate::catalog::{Batch, Catalog, CatalogError, NO_LOG};
use crate::open::device_key;

/// See the module.
pub(crate) struct Known {
    catalog: PathBuf,
    devices: OnceCell<Option<Devices>>,
}

#[derive(Default)]
struct Devices {
    paths: BTreeSet<PathBuf>,
    /// Numbers of devices, where an earlier version wrote no paths down.
    unnamed: BTreeSet<u16>,
}

impl Known {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self { catalog: data_dir.join("catalog"), devices: OnceCell::new() }
    }

    /// Whether the node had a device there; `None` where no catalog can tell.
    pub(crate) fn had(&self, number: usize, path: &Path) -> Option<bool> {
        let devices = self.devices.get_or_init(|| self.look());
        let unnamed = |devices: &Devices| u16::try_from(number).is_ok_and(|n| devices.unnamed.contains(&n));
        devices.as_ref().map(|devices| devices.paths.contains(path) || unnamed(devices))
    }

    fn look(&self) -> Option<Devices> {
        // At a first start there is none, and none is to be made.
        if !self.catalog.join("CURRENT").exists() {
            return None;
        }
        let looked =
            Catalog::open_read_only(&self.catalog, Path::new(NO_LOG)).and_then(|catalog| read(&catalog));
        looked
            .inspect_err(|error| tracing::warn!(%error, "the catalog does not say which devices there were"))
            .ok()
    }
}

fn read(catalog: &Catalog) -> Result<Devices, CatalogError> {
    let mut devices = Devices::default();
    for number in 0..=u16::MAX {
        let device = DeviceId::new(number);
        if let Some(path) = catalog.meta(&path_key(device))? {
            devices.paths.insert(OsString::from_vec(path).into());
        } else if devices.paths.is_empty() && catalog.meta(&device_key(device))?.is_some() {
            devices.unnamed.insert(number);
        } else {
            break;
        }
    }
    Ok(devices)
}

/// Entry that names the path of a device.
fn path_key(device: DeviceId) -> String {
    format!("path/{device}")
}

/// Writes down where the devices are, those that are out among them.
pub(crate) fn put_paths<'a>(paths: impl Iterator<Item = (DeviceId, &'a Path)>, batch: &mut Batch) {
    for (device, path) in paths {
        batch.put_meta(&path_key(device), path.as_os_str().as_bytes());
    }
}

/// Forgets devices that are not configured any more; `count` are.
pub(crate) fn forget_paths(catalog: &Catalog, count: usize, batch: &mut Batch) -> Result<(), CatalogError> {
    for number in (count..).map_while(|number| u16::try_from(number).ok()) {
        let name = path_key(DeviceId::new(number));
        if catalog.meta(&name)?.is_none() {
            break;
        }
        batch.delete_meta(&name);
    }
    Ok(())
}
