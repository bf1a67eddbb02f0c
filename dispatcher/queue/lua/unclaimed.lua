-- A page of the plain entries that nobody has taken: of these there is no record yet.
-- ARGV: queue, cursor ('' at first), entries to look at.
-- Returns {cursor, looked_at, documents…}; the cursor is '' at the queue's end. Entries that are put in
-- or taken out meanwhile are seen, or they are not; all others are.

local queue, cursor, wanted = ARGV[1], ARGV[2], tonumber(ARGV[3])
local STEP = 20 -- entries read at once: each may be as large as its producer liked
local MAX_SEEN = 1048576 -- bytes looked at: some milliseconds of Redis' time
local max_bytes = limits().max_bytes
local found, looked, seen = {}, 0, 0

if not is_usable(queue) then
  return { '', 0 }
end

local function add(value, is_no_document)
  seen = seen + #value
  if not is_no_document and #value <= max_bytes then
    found[#found + 1] = value
  end
end

-- From the left: what is pushed moves entries to where they are seen again, what is taken is at the
-- other end.
local function read_list()
  local first = tonumber(cursor ~= '' and cursor or 0)
  local page = redis.call('LRANGE', stream_of(queue), first, first + STEP - 1)
  for _, element in ipairs(page) do
    add(element, string.sub(element, 1, 1) == '\1') -- what refers to a record is no JSON
  end
  cursor = int(first + STEP)
  return #page
end

local function read_stream()
  local page = redis.call('XRANGE', stream_of(queue), cursor ~= '' and cursor or '-', '+', 'COUNT', STEP)
  for _, entry in ipairs(page) do
    local document
    for i = 1, #entry[2], 2 do
      seen = seen + #entry[2][i + 1]
      document = entry[2][i] == 'task' and entry[2][i + 1] or document -- the last one counts
    end
    add(document or '', not document)
    cursor = '(' .. entry[1]
  end
  return #page
end

local read = are_lists() and read_list or read_stream
repeat
  local count = read()
  looked = looked + count
  if count < STEP then
    cursor = ''
  end
until cursor == '' or looked >= wanted or seen >= MAX_SEEN
return { cursor, looked, unpack(found) }
