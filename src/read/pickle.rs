//! Pickles as data: which tensors a `torch.save`d dictionary names, and nothing else.
//!
//! A pickle is a program for a stack machine that can call any function of any Python module. This reader is a stack
//! machine without functions: it knows the opcodes that `torch.save` writes, and of their callees it knows how to
//! *describe* four (a tensor on a storage, a parameter, an ordered dictionary, a size). Everything else is refused by its
//! name. Nothing is imported, called, built or attached. [`super::torch`] is its one caller.
//!
//! Values live in one list and refer to each other by number, so that no nesting, sharing or cycle that a pickle can
//! express costs more than its bytes: nothing here walks or frees a value recursively. [`MAX_OPCODES`], [`MAX_MEMO`] and
//! [`MAX_DEPTH`] bound what is held to about 100 bytes an opcode.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::dtype::Dtype;
use super::{MAX_RANK, MAX_TENSORS, escaped};

/// Most opcodes that are read: a tensor takes about 25.
pub(super) const MAX_OPCODES: usize = 2_000_000;
/// Most places of the memo.
pub(super) const MAX_MEMO: usize = 1_000_000;
/// Deepest nesting of marks and of tuples and dictionaries: torch.save's dictionaries of tensors have five.
pub(super) const MAX_DEPTH: u8 = 32;

/// A tensor as a pickle describes it: nothing of it has been compared with the archive yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PickledTensor {
    /// Name of the storage's entry below `data/`.
    pub storage: String,
    /// Of the storage.
    pub dtype: Dtype,
    /// Elements of the storage.
    pub storage_elements: u64,
    /// First element.
    pub offset: u64,
    /// Outermost first.
    pub shape: Vec<u64>,
    /// Elements from one to the next, along each dimension. Never negative.
    pub strides: Vec<u64>,
}

/// Index into the list of values.
type Id = u32;

/// A callee or class that a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Storage(Dtype),
}

impl Global {
    fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "Size") => Self::Size,
            ("torch", name) => Self::Storage(match name {
                "DoubleStorage" => Dtype::F64,
                "FloatStorage" => Dtype::F32,
                "HalfStorage" => Dtype::F16,
                "BFloat16Storage" => Dtype::Bf16,
                "LongStorage" => Dtype::I64,
                "IntStorage" => Dtype::I32,
                "ShortStorage" => Dtype::I16,
                "CharStorage" => Dtype::I8,
                "ByteStorage" => Dtype::U8,
                "BoolStorage" => Dtype::Bool,
                _ => return None,
            }),
            _ => return None,
        })
    }
}

#[derive(Debug)]
enum Value {
    None,
    Bool,
    Int(i64),
    Float,
    /// Bytes of the pickle, checked to be UTF-8.
    Text(Range<usize>),
    Tuple(Box<[Id]>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    /// Index into the storages.
    Storage(u32),
    /// Index into the tensors.
    Tensor(u32),
}

impl Value {
    fn what(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a truth value",
            Self::Int(_) | Self::Float => "a number",
            Self::Text(_) => "a string",
            Self::Tuple(_) => "a tuple",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a class or function",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

/// What the machine has: one run, one pickle.
struct Machine<'p> {
    pickle: &'p [u8],
    at: usize,
    values: Vec<Value>,
    /// Nesting of each value.
    depths: Vec<u8>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Entry, dtype, elements.
    storages: Vec<(String, Dtype, u64)>,
    tensors: Vec<PickledTensor>,
}

/// Reads a pickle that must be a dictionary of tensors.
///
/// # Errors
/// In words, what was found and what was expected: an opcode or a global that is not on the list, a budget exceeded, a
/// stack that does not fit, a value that is no tensor, a name that is there twice.
pub(super) fn tensors(pickle: &[u8]) -> Result<Vec<(String, PickledTensor)>, String> {
    let mut machine = Machine {
        pickle,
        at: 0,
        values: Vec::new(),
        depths: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        storages: Vec::new(),
        tensors: Vec::new(),
    };
    let result = machine.run()?;
    let Value::Dict(entries) = &machine.values[result as usize] else {
        let got = machine.values[result as usize].what();
        return Err(format!("got {got} at the top, expected a dictionary of tensors"));
    };
    if entries.len() > MAX_TENSORS {
        return Err(format!("got {} entries, expected at most {MAX_TENSORS}", entries.len()));
    }
    let mut seen = HashSet::with_capacity(entries.len());
    let mut named = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let name = match &machine.values[*key as usize] {
            Value::Text(range) => machine.text(range),
            other => return Err(format!("got {} as a key, expected a name", other.what())),
        };
        if !seen.insert(name) {
            return Err(format!("key `{}` is there twice", escaped(name)));
        }
        match &machine.values[*value as usize] {
            Value::Tensor(at) => named.push((name.to_owned(), machine.tensors[*at as usize].clone())),
            other => {
                return Err(format!("key `{}` holds {} (expected a tensor)", escaped(name), other.what()));
            }
        }
    }
    Ok(named)
}

impl<'p> Machine<'p> {
    fn run(&mut self) -> Result<Id, String> {
        if self.byte()? != 0x80 {
            return Err("got no protocol number, expected a pickle of protocol 2 or later".to_owned());
        }
        let protocol = self.byte()?;
        if !(2..=5).contains(&protocol) {
            return Err(format!("got protocol {protocol}, expected 2 to 5"));
        }
        for _ in 0..MAX_OPCODES {
            let opcode = self.byte()?;
            if opcode == b'.' {
                let result = self.pop()?;
                if !self.stack.is_empty() || self.at != self.pickle.len() {
                    return Err("got more behind its end, expected one value".to_owned());
                }
                return Ok(result);
            }
            self.step(opcode)?;
        }
        Err(format!("got more than {MAX_OPCODES} opcodes"))
    }

    fn step(&mut self, opcode: u8) -> Result<(), String> {
        match opcode {
            b'}' => self.push(Value::Dict(Vec::new()), 1),
            b')' => self.push(Value::Tuple(Box::default()), 1),
            b'N' => self.push(Value::None, 0),
            0x88 | 0x89 => self.push(Value::Bool, 0),
            b'K' => {
                let value = i64::from(self.byte()?);
                self.push(Value::Int(value), 0)
            }
            b'M' => {
                let value = i64::from(u16::from_le_bytes(self.array()?));
                self.push(Value::Int(value), 0)
            }
            b'J' => {
                let value = i64::from(i32::from_le_bytes(self.array()?));
                self.push(Value::Int(value), 0)
            }
            0x8a => self.long(),
            b'G' => {
                self.take(8)?;
                self.push(Value::Float, 0)
            }
            0x8c => {
                let len = u64::from(self.byte()?);
                self.string(len)
            }
            b'X' => {
                let len = u64::from(u32::from_le_bytes(self.array()?));
                self.string(len)
            }
            b'(' => {
                if self.marks.len() >= usize::from(MAX_DEPTH) {
                    return Err(too_deep());
                }
                self.marks.push(self.stack.len());
                Ok(())
            }
            b't' => {
                let items = self.above_mark()?;
                self.tuple(items)
            }
            0x85..=0x87 => {
                let len = usize::from(opcode - 0x84);
                let start = self.above_last_mark(len)?;
                let items = self.stack.split_off(start);
                self.tuple(items)
            }
            b'q' => {
                let place = u32::from(self.byte()?);
                self.remember(place)
            }
            b'r' => {
                let place = u32::from_le_bytes(self.array()?);
                self.remember(place)
            }
            0x94 => {
                let place = self.memo.len() as u32;
                self.remember(place)
            }
            b'h' => {
                let place = u32::from(self.byte()?);
                self.recall(place)
            }
            b'j' => {
                let place = u32::from_le_bytes(self.array()?);
                self.recall(place)
            }
            // A frame is a hint for readers of streams; its length is only checked.
            0x95 => match u64::from_le_bytes(self.array()?) {
                len if len <= (self.pickle.len() - self.at) as u64 => Ok(()),
                len => Err(format!("got a frame of {len} bytes, expected it to end within the pickle")),
            },
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.global(module, name)
            }
            b'Q' => self.persistent(),
            b'R' => self.describe(),
            b's' => {
                let start = self.above_last_mark(2)?;
                let items = self.stack.split_off(start);
                self.set_items(&items)
            }
            b'u' => {
                let items = self.above_mark()?;
                self.set_items(&items)
            }
            // A state dictionary's attributes (its `_metadata`): nothing to us, and only on a dictionary.
            b'b' => {
                self.pop()?;
                match self.top()? {
                    (_, Value::Dict(_)) => Ok(()),
                    (_, other) => {
                        Err(format!("got BUILD on {}, expected it on a dictionary alone", other.what()))
                    }
                }
            }
            _ => Err(format!(
                "got opcode {} at byte {}, expected only those of a dictionary of tensors; nothing of it was run",
                name_of(opcode),
                self.at - 1
            )),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'p [u8], String> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.pickle.len());
        let Some(end) = end else {
            return Err(format!("ends within an opcode (got {} bytes)", self.pickle.len()));
        };
        let bytes = &self.pickle[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// Up to a newline, which is not part of it.
    fn line(&mut self) -> Result<&'p str, String> {
        let rest = &self.pickle[self.at..];
        let Some(len) = rest.iter().position(|byte| *byte == b'\n') else {
            return Err("ends within a name".to_owned());
        };
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| "got a name that is not UTF-8".to_owned())
    }

    fn string(&mut self, len: u64) -> Result<(), String> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let bytes = self.take(len)?;
        if std::str::from_utf8(bytes).is_err() {
            return Err("got a string that is not UTF-8".to_owned());
        }
        self.push(Value::Text(self.at - len..self.at), 0)
    }

    fn text(&self, range: &Range<usize>) -> &'p str {
        std::str::from_utf8(&self.pickle[range.clone()]).unwrap_or_default()
    }

    /// An integer of up to eight bytes, two's complement.
    fn long(&mut self) -> Result<(), String> {
        let len = usize::from(self.byte()?);
        if len > 8 {
            return Err(format!("got an integer of {len} bytes, expected at most 8"));
        }
        let bytes = self.take(len)?;
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..len].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)), 0)
    }

    /// Opcodes bound the number of values, so that `u32` holds it.
    fn push(&mut self, value: Value, depth: u8) -> Result<(), String> {
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
        self.depths.push(depth);
        Ok(())
    }

    /// Where the topmost `len` values begin, which must all lie above the last mark.
    fn above_last_mark(&self, len: usize) -> Result<usize, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.len().checked_sub(len).filter(|start| *start >= floor).ok_or_else(empty)
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.above_last_mark(1)?;
        self.stack.pop().ok_or_else(empty)
    }

    fn pop_text(&mut self) -> Result<&'p str, String> {
        let id = self.pop()?;
        match &self.values[id as usize] {
            Value::Text(range) => Ok(self.text(range)),
            other => Err(format!("got {} as a name, expected a string", other.what())),
        }
    }

    fn top(&self) -> Result<(Id, &Value), String> {
        self.above_last_mark(1)?;
        let id = self.stack.last().copied().ok_or_else(empty)?;
        Ok((id, &self.values[id as usize]))
    }

    fn above_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or_else(|| "got no mark where one is needed".to_owned())?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, items: Vec<Id>) -> Result<(), String> {
        let depth = items.iter().map(|id| self.depths[*id as usize]).max().unwrap_or(0) + 1;
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        self.push(Value::Tuple(items.into()), depth)
    }

    fn remember(&mut self, place: u32) -> Result<(), String> {
        let (id, _) = self.top()?;
        if self.memo.len() >= MAX_MEMO {
            return Err(format!("got a memo of more than {MAX_MEMO} places"));
        }
        self.memo.insert(place, id);
        Ok(())
    }

    fn recall(&mut self, place: u32) -> Result<(), String> {
        let id = self.memo.get(&place).ok_or_else(|| format!("got an empty place {place} of the memo"))?;
        self.stack.push(*id);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        match Global::find(module, name) {
            Some(global) => self.push(Value::Global(global), 0),
            None => Err(format!(
                "got the global `{}.{}`, expected only those of a dictionary of tensors; nothing of it was run",
                escaped(module),
                escaped(name)
            )),
        }
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), String> {
        let (target, value) = self.top()?;
        if !matches!(value, Value::Dict(_)) {
            return Err(format!("got items for {}, expected them for a dictionary", value.what()));
        }
        if !items.len().is_multiple_of(2) {
            return Err("got a key without a value".to_owned());
        }
        let depth = items.iter().map(|id| self.depths[*id as usize]).max().unwrap_or(0) + 1;
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        let known = &mut self.depths[target as usize];
        *known = depth.max(*known);
        if let Value::Dict(entries) = &mut self.values[target as usize] {
            entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        }
        Ok(())
    }

    /// `('storage', torch.FloatStorage, '0', 'cpu', 9)`
    fn persistent(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let expected = || "got a malformed reference to a storage".to_owned();
        let Value::Tuple(items) = &self.values[id as usize] else { return Err(expected()) };
        let [tag, class, key, location, elements] = items[..] else { return Err(expected()) };
        let (
            Value::Text(tag),
            Value::Global(Global::Storage(dtype)),
            Value::Text(key),
            Value::Text(_),
            Value::Int(elements),
        ) = (
            &self.values[tag as usize],
            &self.values[class as usize],
            &self.values[key as usize],
            &self.values[location as usize],
            &self.values[elements as usize],
        )
        else {
            return Err(expected());
        };
        let key = self.text(key);
        let (true, Ok(elements)) = (self.text(tag) == "storage", u64::try_from(*elements)) else {
            return Err(expected());
        };
        // Most pickles name a storage once. Where one is named often, its name must not be copied as often.
        if key.len() > 64 {
            return Err("got a storage with a name of more than 64 bytes".to_owned());
        }
        self.storages.push((key.to_owned(), *dtype, elements));
        let at = self.storages.len() as u32 - 1;
        self.push(Value::Storage(at), 0)
    }

    /// What the callee would have made of its arguments.
    fn describe(&mut self) -> Result<(), String> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let Value::Global(global) = self.values[callee as usize] else {
            return Err(format!("got a call of {}", self.values[callee as usize].what()));
        };
        let Value::Tuple(items) = &self.values[arguments as usize] else {
            return Err(format!(
                "got {} as arguments, expected a tuple",
                self.values[arguments as usize].what()
            ));
        };
        match (global, &items[..]) {
            (Global::OrderedDict, []) => self.push(Value::Dict(Vec::new()), 1),
            (Global::Size, [sizes]) => {
                let sizes = *sizes;
                match &self.values[sizes as usize] {
                    Value::Tuple(_) => {
                        self.stack.push(sizes);
                        Ok(())
                    }
                    other => Err(format!("got torch.Size of {}, expected a tuple", other.what())),
                }
            }
            (Global::RebuildParameter, [data, _, hooks]) if self.is_empty_dict(*hooks) => {
                let data = *data;
                match &self.values[data as usize] {
                    Value::Tensor(_) => {
                        self.stack.push(data);
                        Ok(())
                    }
                    other => Err(format!("got a parameter of {}, expected a tensor", other.what())),
                }
            }
            (Global::RebuildTensor, [storage, offset, shape, strides, _, hooks, rest @ ..])
                if self.is_empty_dict(*hooks)
                    && rest.iter().all(|id| self.is_nothing(*id))
                    && rest.len() < 2 =>
            {
                let tensor = self.tensor([*storage, *offset, *shape, *strides])?;
                self.tensors.push(tensor);
                let at = self.tensors.len() as u32 - 1;
                self.push(Value::Tensor(at), 0)
            }
            (global, items) => {
                Err(format!("got a call of {global:?} with {} unexpected arguments", items.len()))
            }
        }
    }

    fn is_empty_dict(&self, id: Id) -> bool {
        matches!(&self.values[id as usize], Value::Dict(entries) if entries.is_empty())
    }

    /// No conjugation, no negation.
    fn is_nothing(&self, id: Id) -> bool {
        matches!(self.values[id as usize], Value::None) || self.is_empty_dict(id)
    }

    fn tensor(&self, [storage, offset, shape, strides]: [Id; 4]) -> Result<PickledTensor, String> {
        let Value::Storage(storage) = self.values[storage as usize] else {
            return Err("got a tensor without a storage".to_owned());
        };
        let (storage, dtype, storage_elements) = self.storages[storage as usize].clone();
        let natural = |id: Id| match self.values[id as usize] {
            Value::Int(value) => u64::try_from(value).map_err(|_| {
                format!("got a tensor with an offset, size or stride of {value}, expected none below 0")
            }),
            ref other => Err(format!("got {} as an offset, size or stride", other.what())),
        };
        let naturals = |id: Id| match &self.values[id as usize] {
            Value::Tuple(items) if items.len() <= MAX_RANK => {
                items.iter().map(|id| natural(*id)).collect::<Result<Vec<u64>, String>>()
            }
            Value::Tuple(items) => {
                Err(format!("got a tensor of {} dimensions, expected at most {MAX_RANK}", items.len()))
            }
            other => Err(format!("got {} as a shape, expected a tuple", other.what())),
        };
        let (offset, shape, strides) = (natural(offset)?, naturals(shape)?, naturals(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("got {} strides for {} dimensions", strides.len(), shape.len()));
        }
        Ok(PickledTensor { storage, dtype, storage_elements, offset, shape, strides })
    }
}

fn empty() -> String {
    "takes from an empty stack".to_owned()
}

fn too_deep() -> String {
    format!("is nested more than {MAX_DEPTH} deep")
}

/// The names of Python's `pickletools`, of what is most often met where it does not belong.
fn name_of(opcode: u8) -> String {
    let name = match opcode {
        b'i' => "INST",
        b'o' => "OBJ",
        0x81 => "NEWOBJ",
        0x92 => "NEWOBJ_EX",
        0x82..=0x84 => "EXT",
        b'P' => "PERSID",
        b']' => "EMPTY_LIST",
        b'a' => "APPEND",
        b'e' => "APPENDS",
        b'l' => "LIST",
        b'd' => "DICT",
        0x8f => "EMPTY_SET",
        0x90 => "ADDITEMS",
        0x91 => "FROZENSET",
        b'B' | b'C' | 0x8e => "BINBYTES",
        0x96 => "BYTEARRAY8",
        0x97 => "NEXT_BUFFER",
        0x98 => "READONLY_BUFFER",
        b'T' | b'U' | b'S' => "STRING",
        b'V' | 0x8d => "UNICODE",
        0x8b => "LONG4",
        b'I' | b'L' => "INT",
        b'F' => "FLOAT",
        b'0' => "POP",
        b'1' => "POP_MARK",
        b'2' => "DUP",
        b'p' => "PUT",
        b'g' => "GET",
        _ => return format!("{opcode:#04x}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests;
