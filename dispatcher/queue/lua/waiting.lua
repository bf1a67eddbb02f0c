-- Looks at what will be taken next, and takes nothing.
-- ARGV: limit, then queues. A queue that is paused, or whose key is something else, has nothing.
-- Returns queue, document, …: of each queue up to limit, in the order in which they would be taken.

local limit = tonumber(ARGV[1])
local STEP = 20 -- entries read at once: each may be as large as its producer liked
local MAX_SEEN = 1048576 -- bytes looked at in one queue: some milliseconds of Redis' time
local max_bytes, lists = limits().max_bytes, are_lists()
local found = {}

-- Up to STEP entries of a queue as {task id} or {nil, document}, and where the next ones begin.
local function entries_of(queue, cursor)
  local entries = {}
  if lists then
    local first = tonumber(cursor)
    local page = redis.call('LRANGE', stream_of(queue), -first - STEP, -first - 1)
    for i = #page, 1, -1 do -- the right end is taken first
      local token, id = string.match(page[i], '^\1(%d+%-%d+) (.*)$')
      local refers = id and fields_of(id, 'source')[1] == token
      entries[#entries + 1] = refers and { id } or { nil, page[i] }
    end
    return entries, int(first + STEP)
  end
  local page = redis.call('XRANGE', stream_of(queue), cursor, '+', 'COUNT', STEP)
  for _, entry in ipairs(page) do
    local known = {}
    for i = 1, #entry[2], 2 do
      known[entry[2][i]] = entry[2][i + 1]
    end
    entries[#entries + 1] = { known.ref, known.task or '' }
  end
  return entries, #page > 0 and '(' .. page[#page][1] or cursor
end

local function look_at(queue)
  local left, looked, seen = limit, 0, 0
  local function add(document)
    looked, seen = looked + 1, seen + #document
    if document ~= '' and #document <= max_bytes then
      found[#found + 1] = queue
      found[#found + 1] = document
      left = left - 1
    end
  end
  for _, id in ipairs(redis.call('ZRANGE', ready_of(queue), 0, limit - 1)) do
    local r = fields_of(id, 'state', 'owner')
    if seen < MAX_SEEN and r[1] ~= '' and not ENDED[r[1]] and r[2] == '' then
      add(fields_of(id, 'doc')[1])
    end
  end
  local cursor = lists and '0' or '-'
  while left > 0 and looked < 2 * limit and seen < MAX_SEEN do -- what is no task may be all there is
    local entries, after = entries_of(queue, cursor)
    for _, entry in ipairs(entries) do
      if left > 0 then
        add(entry[1] and fields_of(entry[1], 'doc')[1] or entry[2])
      end
    end
    if #entries < STEP then
      break
    end
    cursor = after
  end
end

for i = 2, #ARGV do
  if redis.call('SISMEMBER', PAUSED, ARGV[i]) == 0 and is_usable(ARGV[i]) then
    look_at(ARGV[i])
  end
end
return found
