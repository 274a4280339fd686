//! Decoding of the header: key-value pairs, then tensor descriptions.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::{GgufError, TensorInfo, TensorType, Value};

// The format's own default for `general.alignment`, in bytes.
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_DIMENSIONS: u32 = 4;
// Elements that are reserved ahead of reading them; more grow as they arrive.
const RESERVE_MAX: usize = 1 << 16;

/// The header's bytes in order, with how many the file has left.
pub(super) struct Reader<'a> {
    input: BufReader<&'a File>,
    path: &'a Path,
    position: u64,
    file_bytes: u64,
}

type Header = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

struct RawTensor {
    name: String,
    dimensions: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a File, file_bytes: u64, path: &'a Path) -> Self {
        Self { input: BufReader::with_capacity(1 << 16, file), path, position: 0, file_bytes }
    }

    pub(super) fn header(&mut self) -> Result<Header, GgufError> {
        let not_gguf = || GgufError::NotGguf { path: self.path.to_path_buf() };
        if self.file_bytes < 4 {
            return Err(not_gguf());
        }
        if self.array::<4>("the magic")? != *b"GGUF" {
            return Err(not_gguf());
        }
        let version = self.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version { version });
        }
        let tensor_count = self.u64("the tensor count")?;
        let pair_count = self.u64("the metadata count")?;
        // A description takes at least 24 bytes, a pair at least 13.
        self.expect(tensor_count, 24, "the tensor list")?;
        self.expect(pair_count, 13, "the metadata")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..pair_count {
            let key = self.string("a metadata key")?;
            let kind = self.u32(&key)?;
            let value = self.value(kind, &key)?;
            metadata.insert(key, value);
        }
        let mut raw = Vec::new();
        for _ in 0..tensor_count {
            raw.push(self.raw_tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(value)) if *value > 0 => value.cast_unsigned(),
            Some(_) => return Err(GgufError::Damaged { what: "general.alignment".to_owned() }),
        };
        let start = self.position.checked_next_multiple_of(alignment);
        let start = start.ok_or_else(|| GgufError::Damaged { what: "general.alignment".to_owned() })?;
        let mut tensors = BTreeMap::new();
        for tensor in raw {
            let tensor = self.place(tensor, start)?;
            tensors.insert(tensor.name.clone(), tensor);
        }
        Ok((metadata, tensors))
    }

    fn raw_tensor(&mut self) -> Result<RawTensor, GgufError> {
        let name = self.string("a tensor name")?;
        let count = self.u32(&name)?;
        if count == 0 || count > MAX_DIMENSIONS {
            return Err(GgufError::Damaged { what: format!("tensor {name} has {count} dimensions") });
        }
        let mut dimensions = Vec::new();
        for _ in 0..count {
            dimensions.push(self.u64(&name)?);
        }
        let kind = self.u32(&name)?;
        let offset = self.u64(&name)?;
        Ok(RawTensor { name, dimensions, kind, offset })
    }

    /// Checks that a tensor lies in the file.
    fn place(&self, raw: RawTensor, start: u64) -> Result<TensorInfo, GgufError> {
        let RawTensor { name, dimensions, kind, offset } = raw;
        let kind = TensorType::from_number(kind)
            .map_err(|kind| GgufError::TensorType { tensor: name.clone(), kind })?;
        let truncated = || GgufError::Truncated { what: format!("tensor {name}") };
        let columns = usize::try_from(dimensions[0]).map_err(|_| truncated())?;
        let rows = dimensions[1..].iter().try_fold(1u64, |rows, size| rows.checked_mul(*size));
        let rows = rows.and_then(|rows| usize::try_from(rows).ok()).ok_or_else(truncated)?;
        if columns == 0 || rows == 0 || !columns.is_multiple_of(kind.group_values()) {
            return Err(GgufError::Damaged {
                what: format!("tensor {name} is {rows} by {columns} of {kind:?}"),
            });
        }
        let offset = start.checked_add(offset).ok_or_else(truncated)?;
        let bytes = (columns / kind.group_values())
            .checked_mul(kind.group_bytes())
            .and_then(|row| row.checked_mul(rows))
            .ok_or_else(truncated)?;
        let end = offset.checked_add(bytes as u64).ok_or_else(truncated)?;
        if end > self.file_bytes {
            return Err(truncated());
        }
        Ok(TensorInfo { name, rows, columns, kind, offset })
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, GgufError> {
        Ok(match kind {
            0..=5 | 10..=11 => Value::Integer(self.integer(kind, key)?),
            6 | 12 => Value::Float(self.float(kind, key)?),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            8 => Value::Text(self.string(key)?),
            9 => self.list(key)?,
            other => return Err(GgufError::Damaged { what: format!("{key} has the unknown type {other}") }),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value, GgufError> {
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        let element_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            // A list of lists takes at least a type and a count each.
            9 => 12,
            other => {
                return Err(GgufError::Damaged { what: format!("{key} lists the unknown type {other}") });
            }
        };
        let count = self.expect(count, element_bytes, key)?;
        match kind {
            8 => {
                let mut texts = Vec::with_capacity(count.min(RESERVE_MAX));
                for _ in 0..count {
                    texts.push(self.string(key)?);
                }
                Ok(Value::Texts(texts))
            }
            9 => Err(GgufError::Damaged { what: format!("{key} is a list of lists") }),
            _ => {
                let mut numbers = Vec::with_capacity(count.min(RESERVE_MAX));
                for _ in 0..count {
                    numbers.push(match kind {
                        6 | 12 => self.float(kind, key)?,
                        7 => f64::from(self.array::<1>(key)?[0]),
                        _ => self.integer(kind, key)? as f64,
                    });
                }
                Ok(Value::Numbers(numbers))
            }
        }
    }

    fn integer(&mut self, kind: u32, key: &str) -> Result<i64, GgufError> {
        Ok(match kind {
            0 => i64::from(self.array::<1>(key)?[0]),
            1 => i64::from(i8::from_le_bytes(self.array(key)?)),
            2 => i64::from(u16::from_le_bytes(self.array(key)?)),
            3 => i64::from(i16::from_le_bytes(self.array(key)?)),
            4 => i64::from(self.u32(key)?),
            5 => i64::from(i32::from_le_bytes(self.array(key)?)),
            10 => i64::try_from(self.u64(key)?)
                .map_err(|_| GgufError::Damaged { what: format!("{key} is larger than 2^63") })?,
            _ => i64::from_le_bytes(self.array(key)?),
        })
    }

    fn float(&mut self, kind: u32, key: &str) -> Result<f64, GgufError> {
        if kind == 6 {
            Ok(f64::from(f32::from_le_bytes(self.array(key)?)))
        } else {
            Ok(f64::from_le_bytes(self.array(key)?))
        }
    }

    fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let count = self.u64(what)?;
        let count = self.expect(count, 1, what)?;
        let mut bytes = vec![0; count];
        self.fill(&mut bytes, what)?;
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    /// Checks that `count` elements of at least `bytes` bytes can still follow.
    fn expect(&self, count: u64, bytes: u64, what: &str) -> Result<usize, GgufError> {
        let left = self.file_bytes - self.position;
        match count.checked_mul(bytes) {
            Some(needed) if needed <= left => usize::try_from(count).ok(),
            _ => None,
        }
        .ok_or_else(|| GgufError::Truncated { what: what.to_owned() })
    }

    fn fill(&mut self, target: &mut [u8], what: &str) -> Result<(), GgufError> {
        self.expect(target.len() as u64, 1, what)?;
        let io_error = |error| GgufError::Io { path: self.path.to_path_buf(), error };
        self.input.read_exact(target).map_err(io_error)?;
        self.position += target.len() as u64;
        Ok(())
    }
}
